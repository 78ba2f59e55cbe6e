"""SwiGLU on a GPU: one pass forward and one backward."""

from __future__ import annotations

import torch

from megagpt.kernels.triton_support import triton_problem


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return triton_problem(device, dtype)


@torch.library.custom_op("megagpt::swiglu_forward", mutates_args=())
def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from megagpt.kernels.swiglu import triton_kernels as kernels

    out = torch.empty_like(gate)
    grid = (-(-gate.numel() // kernels.BLOCK),)
    kernels.forward[grid](gate, up, out, gate.numel(), BLOCK=kernels.BLOCK)
    return out


@torch.library.custom_op("megagpt::swiglu_backward", mutates_args=())
def _backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from megagpt.kernels.swiglu import triton_kernels as kernels

    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (-(-gate.numel() // kernels.BLOCK),)
    kernels.backward[grid](gate, up, grad, of_gate, of_up, gate.numel(), BLOCK=kernels.BLOCK)
    return of_gate, of_up


@_forward.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@_backward.register_fake
def _(gate, up, grad):
    return torch.empty_like(gate), torch.empty_like(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx, grad_output):
        return _backward(*ctx.saved_tensors, grad_output.contiguous())


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `contract.SwiGLU`."""
    return _SwiGLU.apply(gate, up)
