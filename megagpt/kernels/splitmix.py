"""SplitMix64 on torch's int64: numbers by key and place, the same on every device.

Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195.
"""

from __future__ import annotations

import torch


def signed(value: int) -> int:
    """The int64 with the bits of a 64-bit constant; torch's int64 products wrap around."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
"""SplitMix64's distance from one state to the next."""
_MULTIPLIERS = (signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB))


def shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of int64 moved down, zeros moved in."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # >> copies the sign


def mix_(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, in place, on int64 bits.

    Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195.
    """
    z.bitwise_xor_(shift_right(z, 30)).mul_(_MULTIPLIERS[0])
    z.bitwise_xor_(shift_right(z, 27)).mul_(_MULTIPLIERS[1])
    return z.bitwise_xor_(shift_right(z, 31))
