"""Keyed dropout on a GPU: one pass each way, and nothing kept between them."""

from __future__ import annotations

import torch

from megagpt.kernels.dropout.contract import threshold
from megagpt.kernels.triton_support import triton_problem


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return triton_problem(device, dtype)


@torch.library.custom_op("megagpt::dropout", mutates_args=())
def _dropped(x: torch.Tensor, stream: torch.Tensor, first: int, probability: float) -> torch.Tensor:
    from megagpt.kernels.dropout import triton_kernels as kernels

    out = torch.empty_like(x)
    size = x[0].numel()
    grid = (-(-size // kernels.BLOCK), x.shape[0])
    kernels.dropout[grid](
        *(x, stream, out, size, first, threshold(probability), 1.0 - probability),
        BLOCK=kernels.BLOCK,
    )
    return out


@_dropped.register_fake
def _(x, stream, first, probability):
    return torch.empty_like(x)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stream, first, probability):
        ctx.save_for_backward(stream)
        ctx.arguments = (first, probability)
        return _dropped(x.contiguous(), stream, first, probability)

    @staticmethod
    def backward(ctx, grad_output):
        (stream,) = ctx.saved_tensors
        return _dropped(grad_output.contiguous(), stream, *ctx.arguments), None, None, None


def dropout(
    x: torch.Tensor, stream: torch.Tensor, *, first: int, probability: float
) -> torch.Tensor:
    """See `contract.Dropout`."""
    return _Dropout.apply(x, stream, first, probability)
