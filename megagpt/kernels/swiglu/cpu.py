"""SwiGLU on a CPU: one pass forward and one backward."""

from __future__ import annotations

import torch

from megagpt.kernels.native import POINTER, SIZE, Library, at

_LIBRARY = Library(
    __file__,
    {
        "swiglu_forward": [POINTER] * 3 + [SIZE],
        "swiglu_backward": [POINTER] * 5 + [SIZE],
    },
)


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _LIBRARY.call("swiglu_forward", gate.dtype, at(gate), at(up), at(out), out.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        gate, up = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _LIBRARY.call(
            "swiglu_backward",
            gate.dtype,
            at(gate),
            at(up),
            at(grad_output),
            at(of_gate),
            at(of_up),
            gate.numel(),
        )
        return of_gate, of_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `contract.SwiGLU`."""
    return _SwiGLU.apply(gate, up)
