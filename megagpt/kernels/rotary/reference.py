"""The definition of rotary positions, in differentiable torch."""

from __future__ import annotations

import torch


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.Rotary`."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [1 or b, s, 1, d/2]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return turned(query), turned(key)
