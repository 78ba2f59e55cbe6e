"""Several datasets as one: a weighted blend for training, one after the other for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagpt.data.samples.blend import Blend, megatron_blend
from megagpt.data.samples.gpt_dataset import GPTDataset

# Positions of the blend computed at a time.
_BLOCK = 1 << 14


class BlendedDataset:
    """Samples of several datasets in proportion to weights; each goes on into its own epochs.

    Args:
        datasets: Members, in training order.
        weights: Of each, positive; they need not sum to 1.
        megatron_samples: Replay Megatron's blend of a run of so many samples; None: our own.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float],
        *,
        megatron_samples: int | None = None,
    ) -> None:
        assert len(datasets) == len(weights), "a weight for each member"
        self.datasets = list(datasets)
        self.seq_length = datasets[0].seq_length
        self.blend = Blend(weights)
        self._replayed = (
            megatron_blend(weights, megatron_samples) if megatron_samples is not None else None
        )
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Samples in which each member has had its epoch once on the whole."""
        return sum(len(dataset) for dataset in self.datasets)

    def locate(self, index: int) -> tuple[int, int]:
        """Member that gives a sample, and the sample's number there."""
        members, samples = self._locate([index])
        return int(members[0]), int(samples[0])

    def counts(self, num_samples: int) -> np.ndarray:
        """Samples of each member among the first num_samples: [m], int64."""
        if self._replayed is None:
            return self.blend.counts(num_samples)
        return np.bincount(self._replayed[0][:num_samples], minlength=len(self.datasets))

    def gather(self, indices: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples; see `GPTDataset.gather`."""
        return _gather(self.datasets, *self._locate(indices), out)

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.asarray(indices, dtype=np.int64)
        if self._replayed is not None:
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self._replayed[0]):
                raise IndexError(
                    f"samples {numbers.min()} to {numbers.max()} of {len(self._replayed[0])}"
                )
            return self._replayed[0][numbers], self._replayed[1][numbers]
        if len(numbers) and numbers.min() < 0:
            raise IndexError(f"sample {numbers.min()} is negative")
        members = np.empty(len(numbers), dtype=np.int32)
        samples = np.empty(len(numbers), dtype=np.int64)
        for block in np.unique(numbers // _BLOCK).tolist():
            rows = np.flatnonzero(numbers // _BLOCK == block)
            block_members, block_samples = self._block(block)
            places = numbers[rows] - block * _BLOCK
            members[rows], samples[rows] = block_members[places], block_samples[places]
        return members, samples

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._blocks:
            self._blocks = {n: block for n, block in self._blocks.items() if n == number - 1}
            self._blocks[number] = self.blend.slice(number * _BLOCK, _BLOCK)
        return self._blocks[number]


class JoinedDataset:
    """Datasets in evaluation order, one after the other.

    Args:
        datasets: Members, each with its one epoch.
    """

    def __init__(self, datasets: Sequence[GPTDataset]) -> None:
        self.datasets = list(datasets)
        self.seq_length = datasets[0].seq_length
        self._bounds = np.cumsum([0, *map(len, datasets)])

    def __len__(self) -> int:
        """Samples of all members."""
        return int(self._bounds[-1])

    def gather(self, indices: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples; see `GPTDataset.gather`."""
        numbers = np.asarray(indices, dtype=np.int64)
        members = np.searchsorted(self._bounds[1:], numbers, side="right")
        return _gather(self.datasets, members, numbers - self._bounds[members], out)


def _gather(
    datasets: list[GPTDataset], members: np.ndarray, samples: np.ndarray, out: np.ndarray | None
) -> np.ndarray:
    if out is None:
        out = np.empty((len(members), datasets[0].seq_length + 1), dtype=np.int64)
    for member in np.unique(members):
        rows = np.flatnonzero(members == member)
        out[rows] = datasets[member].gather(samples[rows])
    return out
