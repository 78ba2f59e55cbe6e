"""The definition of SwiGLU, in differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `contract.SwiGLU`; torch rounds silu(gate) to the type between."""
    return F.silu(gate) * up
