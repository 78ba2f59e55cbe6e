"""SwiGLU on a CPU: one pass forward and one backward."""

from __future__ import annotations

import torch

from megagpt.kernels.native import at, native, native_problem


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return native_problem(device, dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        native("swiglu_forward", gate.dtype)(at(gate), at(up), at(out), out.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        gate, up = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        native("swiglu_backward", gate.dtype)(
            at(gate), at(up), at(grad_output), at(of_gate), at(of_up), gate.numel()
        )
        return of_gate, of_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `contract.SwiGLU`."""
    return _SwiGLU.apply(gate, up)
