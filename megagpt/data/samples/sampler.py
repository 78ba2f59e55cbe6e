"""Which samples a rank takes; the position in the data is `consumed_samples` and nothing else.

Knows neither datasets nor process groups: it maps integers to integers.
"""

from __future__ import annotations

from collections.abc import Iterator


class BatchSampler:
    """Deals the samples of each global batch out to data-parallel ranks.

    The step that begins at consumed_samples takes the next global_batch_size samples, on every
    layout: rank r's micro-batch j begins at consumed_samples + (j * dp_size + r) *
    micro_batch_size.

    Args:
        global_batch_size: Samples per step over all ranks.
        micro_batch_size: Samples per rank per forward pass.
        dp_rank: This rank among the data-parallel ranks.
        dp_size: Data-parallel ranks.

    Raises:
        ValueError: If micro_batch_size * dp_size does not divide global_batch_size.
    """

    def __init__(
        self, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} of dp_size={dp_size}"
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size={global_batch_size} is not divisible by micro_batch_size="
                f"{micro_batch_size} x data-parallel size {dp_size}; choose a multiple of "
                f"{micro_batch_size * dp_size}"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    def micro_batches(self, consumed_samples: int) -> list[list[int]]:
        """Sample indices of this rank's micro-batches in the step beginning at consumed_samples."""
        return list(self._deal(consumed_samples, consumed_samples + self.global_batch_size))

    def evaluation_batches(self, num_samples: int) -> Iterator[list[int]]:
        """This rank's micro-batches over samples 0 to num_samples - 1, each taken by one rank once.

        Every rank gets the same number, all of micro_batch_size; -1 stands for a sample to be
        filled with padding, whose loss is ignored.
        """
        for indices in self._deal(0, num_samples):
            yield [index if index < num_samples else -1 for index in indices]

    def _deal(self, begin: int, end: int) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.dp_size
        for row in range(begin, end, stride):
            first = row + self.dp_rank * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))
