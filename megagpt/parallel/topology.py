"""Rank <-> (pp, dp, tp) in pure integers; knows nothing of processes."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["pp", "dp", "tp"]


@dataclass(frozen=True)
class ParallelTopology:
    """World order (pp, dp, tp), tp fastest, as DeepSpeed's `PipeModelDataParallelTopology`."""

    world_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Checks that the degrees divide the world."""
        tp, pp = self.tensor_parallel_size, self.pipeline_parallel_size
        if self.world_size % (tp * pp):
            raise ValueError(
                f"world size {self.world_size} is not divisible by tensor_parallel_size={tp} x "
                f"pipeline_parallel_size={pp}; start a multiple of {tp * pp} ranks"
            )

    @property
    def data_parallel_size(self) -> int:
        """Ranks left for data parallelism."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank."""
        assert 0 <= rank < self.world_size
        rest, tp = divmod(rank, self.tensor_parallel_size)
        pp, dp = divmod(rest, self.data_parallel_size)
        return pp, dp, tp

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Ranks of each group whose members differ in these axes only, in rising order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = zip(("pp", "dp", "tp"), self.coordinates(rank), strict=True)
            groups.setdefault(tuple(i for axis, i in place if axis not in axes), []).append(rank)
        return list(groups.values())
