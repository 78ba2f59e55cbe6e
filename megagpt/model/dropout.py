"""Dropout whose mask is a function of (seed, step, sample, layer, site, element) and nothing else.

So no layout, no accumulation and no recomputation changes or repeats a mask, and no generator has
state to save. Each sample has a SplitMix64 stream, of which an element takes its own number.
Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195.
"""

# b micro-batch, s sequence, h hidden; s/tp only under sequence parallelism

from __future__ import annotations

from enum import IntEnum

import torch

_BITS = 24
"""Bits of a number that are compared with the probability."""


class Site(IntEnum):
    """Where in a layer an element is dropped."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit constant; torch's int64 products wrap around."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> copies the sign


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64 bits."""
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


def dropout_keys(sample_indices: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """The key of each sample in one step.

    Args:
        sample_indices: [b], int64, global indices of samples.
        seed: Of the run.
        step: Optimizer step, from 1.

    Returns:
        [b], int64.
    """
    state = _mix(torch.tensor(seed, dtype=torch.int64) + _GOLDEN)
    state = _mix(state ^ _mix(torch.tensor(step, dtype=torch.int64) + _GOLDEN))
    return _mix(state ^ _mix(sample_indices + _GOLDEN))


def keyed_dropout(
    x: torch.Tensor,
    keys: torch.Tensor | None,
    *,
    probability: float,
    layer: int,
    site: Site,
    sequence_start: int = 0,
) -> torch.Tensor:
    """Zeroes elements and scales the others by 1 / (1 - probability).

    Args:
        x: [b, s, h], or a slice [b, s/tp, h] of the sequence.
        keys: [b], from `dropout_keys`; None drops nothing.
        probability: Of dropping an element, to 24 bits.
        layer: Index of the block.
        site: Where in the block.
        sequence_start: Position of x's first token in the sequence.

    Returns:
        As x.
    """
    if keys is None or probability == 0:
        return x
    s, h = x.shape[1:]
    stream = _mix(keys ^ _mix(torch.full_like(keys, layer * len(Site) + site) + _GOLDEN))  # [b]
    first = sequence_start * h + 1
    counters = torch.arange(first, first + s * h, device=x.device) * _GOLDEN  # [s*h]
    numbers = _shift_right(_mix(stream.unsqueeze(-1) + counters), 64 - _BITS)  # [b, s*h]
    kept = (numbers >= round(probability * (1 << _BITS))).view(x.shape)
    return torch.where(
        kept, x / (1.0 - probability), torch.zeros((), dtype=x.dtype, device=x.device)
    )
