"""The definition of keyed dropout, in differentiable torch."""

# b micro-batch, s sequence, h hidden

from __future__ import annotations

import torch

from megagpt.kernels.dropout.contract import BITS, threshold
from megagpt.kernels.splitmix import GOLDEN, mix_, shift_right


def dropout(
    x: torch.Tensor, stream: torch.Tensor, *, first: int, probability: float
) -> torch.Tensor:
    """See `contract.Dropout`."""
    size = x[0].numel()
    counters = torch.arange(first + 1, first + 1 + size, device=x.device) * GOLDEN  # [s*h]
    numbers = shift_right(mix_(stream.unsqueeze(-1) + counters), 64 - BITS)  # [b, s*h]
    kept = (numbers >= threshold(probability)).view(x.shape)
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(kept, x / (1.0 - probability), nothing)
