"""The definition of accumulation, in torch."""

from __future__ import annotations

import torch


def accumulate(total: torch.Tensor, part: torch.Tensor) -> None:
    """See `contract.Accumulate`."""
    total.add_(part.view(total.shape))
