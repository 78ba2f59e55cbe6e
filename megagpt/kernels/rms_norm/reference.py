"""The definition of RMSNorm, in differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.RMSNorm`."""
    z = x if residual is None else x + residual
    return F.rms_norm(z, z.shape[-1:], weight, eps), z
