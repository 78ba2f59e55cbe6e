"""RMSNorm on a GPU: a row is read once each way."""

# r rows (all dims but the last), h the size that is normalised

from __future__ import annotations

import torch

from megagpt.kernels.triton_support import num_warps, power_of_two, triton_problem

_PROGRAMS = 256
"""Runs of rows whose parts of the weight's gradient are summed apart: some for each processor."""


def problem(device: torch.device, dtype: torch.dtype, *, size: int, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return triton_problem(device, dtype, row=size)


@torch.library.custom_op("megagpt::rms_norm_forward", mutates_args=())
def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from megagpt.kernels.rms_norm import triton_kernels as kernels

    size = x.shape[-1]
    rows, block = x.numel() // size, power_of_two(size)
    y = torch.empty_like(x)
    z = torch.empty_like(x) if residual is not None else x.new_empty(0)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        kernels.forward[(rows,)](
            *(x, x if residual is None else residual, weight, y, z, rstd, size, eps),
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return y, z, rstd


@torch.library.custom_op("megagpt::rms_norm_backward", mutates_args=())
def _backward(
    z: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    of_y: torch.Tensor,
    of_z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from megagpt.kernels.rms_norm import triton_kernels as kernels

    rows, size = rstd.numel(), z.shape[-1]
    block = power_of_two(size)
    run = max(-(-rows // _PROGRAMS), 1)
    programs = -(-rows // run)
    of_x = torch.empty_like(z)
    parts = torch.empty(programs, size, dtype=torch.float32, device=z.device)
    if rows:
        kernels.backward[(programs,)](
            *(z, weight, rstd, of_y, z if of_z is None else of_z, of_x, parts, rows, run, size),
            HAS_OF_Z=of_z is not None,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return of_x, parts.sum(dim=0).to(weight.dtype)


@_forward.register_fake
def _(x, residual, weight, eps):
    z = torch.empty_like(x) if residual is not None else x.new_empty(0)
    rstd = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    return torch.empty_like(x), z, rstd


@_backward.register_fake
def _(z, weight, rstd, of_y, of_z):
    return torch.empty_like(z), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    """Gives y, and z where there is a residual."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y, z, rstd = _forward(x, residual, weight, eps)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(z if ctx.has_residual else x, weight, rstd)
        ctx.set_materialize_grads(False)
        return (y, z) if ctx.has_residual else y

    @staticmethod
    def backward(ctx, of_y, of_z=None):
        z, weight, rstd = ctx.saved_tensors
        of_y = torch.zeros_like(z) if of_y is None else of_y.contiguous()
        of_z = None if of_z is None else of_z.contiguous()
        of_x, of_weight = _backward(z, weight, rstd, of_y, of_z)
        return of_x, of_weight, None, of_x if ctx.has_residual else None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.RMSNorm`."""
    if residual is None:
        return _RMSNorm.apply(x, weight, eps, None), x
    return _RMSNorm.apply(x, weight, eps, residual)
