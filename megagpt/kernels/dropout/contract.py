"""What every back end of keyed dropout does.

The bits are SplitMix64's (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195):
element i of a sample is drawn from state stream + (first + i + 1) * GOLDEN, so that any part of a
tensor is drawn alike on any device.
"""

# b micro-batch, s sequence, h hidden

from __future__ import annotations

from typing import Protocol

import torch

BITS = 24
"""Of a number that decides, so that float32 would hold it."""


class Dropout(Protocol):
    """Zeroes elements and divides the others by 1 - probability; backward draws the bits again."""

    def __call__(
        self, x: torch.Tensor, stream: torch.Tensor, *, first: int, probability: float
    ) -> torch.Tensor:
        """Of each element.

        Args:
            x: [b, s, h], any float type. Not modified.
            stream: [b], int64: where each sample's numbers begin.
            first: Number of the sample's first element.
            probability: Of dropping an element, to `BITS` bits.

        Returns:
            As x.
        """
        ...


def threshold(probability: float) -> int:
    """An element stays whose number is not below this."""
    return round(probability * (1 << BITS))
