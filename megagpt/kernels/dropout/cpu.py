"""Keyed dropout on a CPU: one pass each way, and nothing kept between them."""

from __future__ import annotations

import torch

from megagpt.kernels.dropout.contract import threshold
from megagpt.kernels.native import FLOAT, POINTER, SIZE, Library, at

_LIBRARY = Library(__file__, {"dropout": [POINTER] * 3 + [SIZE] * 4 + [FLOAT]})


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


def _dropped(x: torch.Tensor, stream: torch.Tensor, first: int, probability: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    sizes = (x.shape[0], x[0].numel(), first, threshold(probability))
    _LIBRARY.call("dropout", x.dtype, at(x), at(stream), at(out), *sizes, 1.0 - probability)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stream, first, probability):
        ctx.save_for_backward(stream)
        ctx.arguments = (first, probability)
        return _dropped(x, stream, first, probability)

    @staticmethod
    def backward(ctx, grad_output):
        (stream,) = ctx.saved_tensors
        return _dropped(grad_output, stream, *ctx.arguments), None, None, None


def dropout(
    x: torch.Tensor, stream: torch.Tensor, *, first: int, probability: float
) -> torch.Tensor:
    """See `contract.Dropout`."""
    return _Dropout.apply(x, stream, first, probability)
