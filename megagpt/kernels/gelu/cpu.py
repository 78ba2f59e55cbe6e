"""GELU on a CPU: one pass forward and one backward."""

from __future__ import annotations

import torch

from megagpt.kernels.native import POINTER, SIZE, Library, at

_LIBRARY = Library(
    __file__,
    {
        "gelu_forward": [POINTER] * 2 + [SIZE],
        "gelu_backward": [POINTER] * 3 + [SIZE],
    },
)


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        out = torch.empty_like(x)
        _LIBRARY.call("gelu_forward", x.dtype, at(x), at(out), x.numel())
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        grad_output, grad = grad_output.contiguous(), torch.empty_like(x)
        _LIBRARY.call("gelu_backward", x.dtype, at(x), at(grad_output), at(grad), x.numel())
        return grad


def gelu(x: torch.Tensor) -> torch.Tensor:
    """See `contract.GELU`."""
    return _GELU.apply(x)
