"""Accumulation on a CPU: one pass, where torch converts the whole part first."""

from __future__ import annotations

import torch

from megagpt.kernels.native import POINTER, SIZE, Library, at

_LIBRARY = Library(__file__, {"accumulate": [POINTER, POINTER, SIZE]})


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on parts like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


def accumulate(total: torch.Tensor, part: torch.Tensor) -> None:
    """See `contract.Accumulate`."""
    assert total.dtype == torch.float32 and total.numel() == part.numel()
    _LIBRARY.call("accumulate", part.dtype, at(total), at(part), part.numel())
