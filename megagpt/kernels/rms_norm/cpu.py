"""RMSNorm on a CPU: a row stays in the cache through all passes over it."""

# r rows, h the size that is normalised

from __future__ import annotations

import torch

from megagpt.kernels.native import FLOAT, POINTER, SIZE, Library, at

_BLOCKS = 64
"""Runs of rows whose parts of the weight's gradient are summed apart, whatever the threads."""

_LIBRARY = Library(
    __file__,
    {
        "rms_norm_forward": [POINTER] * 6 + [SIZE, SIZE, FLOAT],
        "rms_norm_backward": [POINTER] * 7 + [SIZE] * 3,
    },
)


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


class _RMSNorm(torch.autograd.Function):
    """Gives y, and z where there is a residual."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        x = x.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        y, z = torch.empty_like(x), x
        if residual is not None:
            residual, z = residual.contiguous(), torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32)
        _LIBRARY.call(
            "rms_norm_forward",
            x.dtype,
            *(at(x), at(residual), at(weight), at(y), at(z), at(rstd), rows, size, eps),
        )
        ctx.save_for_backward(z, weight, rstd)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, z)

    @staticmethod
    def backward(ctx, of_y, of_z=None):
        z, weight, rstd = ctx.saved_tensors
        of_y = torch.zeros_like(z) if of_y is None else of_y.contiguous()
        of_z = None if of_z is None else of_z.contiguous()
        of_x = torch.empty_like(z)
        rows, size = rstd.numel(), z.shape[-1]
        parts = torch.empty(min(_BLOCKS, max(rows, 1)), size, dtype=torch.float32)
        _LIBRARY.call(
            "rms_norm_backward",
            z.dtype,
            *(at(z), at(weight), at(rstd), at(of_y), at(of_z), at(of_x), at(parts)),
            *(rows, size, parts.shape[0]),
        )
        return of_x, parts.sum(dim=0).to(weight.dtype), None, of_x if ctx.has_residual else None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.RMSNorm`."""
    if residual is None:
        # z is x: handed on as it is, so that its gradient is no pass of ours.
        return _RMSNorm.apply(x, weight, eps, None), x
    return _RMSNorm.apply(x, weight, eps, residual)
