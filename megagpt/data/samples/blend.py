"""Which member of a blend gives position i, and which of its samples.

Sample k of member d with weight w is due at (k + p) / w, where the phase p of the d-th member keeps
members of one weight from being due together; positions go by due time. So the blend of any
position can be found without those before it: there is nothing to build, to keep or to reload, and
a longer run changes nothing. Next file: `blended_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagpt.data.native import address, load_native

_GOLDEN_RATIO = (5**0.5 - 1) / 2


class Blend:
    """An endless interleaving of members in proportion to their weights.

    Up to any position a member has had its share of the samples, to within a few.

    Args:
        weights: [m], positive; they need not sum to 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        self.shares = shares / shares.sum()
        self._periods = 1.0 / self.shares
        # Multiples of the golden ratio, modulo 1, lie evenly however many there are.
        self._phases = (0.5 + np.arange(len(shares)) * _GOLDEN_RATIO) % 1.0

    def slice(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions begin to begin + count - 1.

        Returns:
            Member, [count], int32, and number of the member's sample, [count], int64, of each.
        """
        counts = self._counts_before(float(begin - len(self.shares) - 1))
        # By then at most `begin` positions are over, and few are between.
        skipped = begin - int(counts.sum())
        assert skipped >= 0, "counts run ahead of the position"
        members, samples = self._walk(counts, skipped + count)
        return members[skipped:], samples[skipped:]

    def counts(self, num_positions: int) -> np.ndarray:
        """Samples of each member among the first positions: [m], int64."""
        counts = self._counts_before(float(num_positions - len(self.shares) - 1))
        members, _ = self._walk(counts, num_positions - int(counts.sum()))
        return counts + np.bincount(members, minlength=len(counts))

    def _counts_before(self, time: float) -> np.ndarray:
        """Samples of each member that are due before a time: [m], int64."""
        counts = np.maximum(np.ceil(time * self.shares - self._phases), 0).astype(np.int64)
        # Rounding: the due times, as they are computed everywhere, decide.
        while np.any(late := (counts > 0) & (self._due(counts - 1) >= time)):
            counts -= late
        while np.any(early := self._due(counts) < time):
            counts += early
        return counts

    def _due(self, counts: np.ndarray) -> np.ndarray:
        """When each member's next sample is due after so many: [m]."""
        return (counts + self._phases) * self._periods

    def _walk(self, counts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next positions after members have had so many samples."""
        library = load_native()
        if library is None:
            return self._walk_in_python(counts, count)
        members = np.empty(count, dtype=np.int32)
        samples = np.empty(count, dtype=np.int64)
        counts = counts.copy()  # counted on in place
        library.megagpt_blend(
            address(self._periods),
            address(self._phases),
            address(counts),
            len(counts),
            count,
            address(members),
            address(samples),
        )
        return members, samples

    def _walk_in_python(self, counts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        # All that are due within a span that is sure to hold enough, then the first of them.
        span = float(counts.sum() + count + 2 * len(counts) + 2)
        numbers = np.maximum(self._counts_before(span) - counts, 0)
        members = np.repeat(np.arange(len(counts)), numbers)
        firsts = np.repeat(counts - (np.cumsum(numbers) - numbers), numbers)
        samples = firsts + np.arange(len(members))
        due = (samples + self._phases[members]) * self._periods[members]
        order = np.lexsort((members, due))[:count]
        return members[order].astype(np.int32), samples[order]


def megatron_blend(weights: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Megatron-LM's blend: each position goes to the member that is furthest behind its share.

    Args:
        weights: [m], positive.
        count: Positions, from 0; 12 bytes each.

    Returns:
        Member, [count], int32, and number of the member's sample, [count], int64, of each.

    Source: Megatron-LM, megatron/core/datasets/helpers.cpp, build_blending_indices.
    """
    shares = np.asarray(weights, dtype=np.float64)
    # Twice, and it rounds twice: in Megatron's builder and in its blended dataset.
    shares = shares / shares.sum()
    shares = shares / shares.sum()
    members = np.empty(count, dtype=np.int32)
    samples = np.empty(count, dtype=np.int64)
    library = load_native()
    if library is not None:
        library.megagpt_megatron_blend(
            address(shares), len(shares), count, address(members), address(samples)
        )
        return members, samples
    counts = np.zeros(len(shares), dtype=np.int64)
    for i in range(count):
        member = int(np.argmax(shares * max(i, 1) - counts))
        members[i], samples[i] = member, counts[member]
        counts[member] += 1
    return members, samples
