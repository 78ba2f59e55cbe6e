"""The definition of GELU, torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """See `contract.GELU`."""
    return F.gelu(x, approximate="tanh")
