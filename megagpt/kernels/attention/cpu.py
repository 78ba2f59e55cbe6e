"""Attention on a CPU with 512-bit vectors: `native.cpp`, in blocks, skipping what is not seen."""

# b micro-batch, s sequence, n query heads, k key/value heads, d head dim

from __future__ import annotations

import torch

from megagpt.kernels.attention.contract import Documents
from megagpt.kernels.native import FLOAT, POINTER, SIZE, Library, at

_SIZES = [SIZE] * 5
_LIBRARY = Library(
    __file__,
    {
        "attention_forward": [POINTER] * 6 + [*_SIZES, FLOAT],
        "attention_backward": [POINTER] * 10 + [*_SIZES, FLOAT],
    },
)


def problem(device: torch.device, dtype: torch.dtype, *, head_size: int, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    if head_size % 16 or head_size > 256:
        return f"head_size={head_size} is not a multiple of 16 up to 256"
    return _LIBRARY.problem(device, dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, first):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        b, s, n, d = query.shape
        ctx.sizes = (b, s, n, key.shape[2], d, d**-0.5)
        out = torch.empty_like(query)
        log_sum_exp = torch.empty(b, n, s, dtype=torch.float32)
        _LIBRARY.call(
            "attention_forward",
            query.dtype,
            *map(at, (query, key, value, first, out, log_sum_exp)),
            *ctx.sizes,
        )
        ctx.save_for_backward(query, key, value, out, log_sum_exp, first)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, out, log_sum_exp, first = ctx.saved_tensors
        grads = tuple(map(torch.empty_like, (query, key, value)))
        inputs = (query, key, value, out, grad_output.contiguous(), log_sum_exp, first)
        _LIBRARY.call("attention_backward", query.dtype, *map(at, (*inputs, *grads)), *ctx.sizes)
        return *grads, None


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    """See `contract.Attention`."""
    first = None if documents is None else documents.first
    return _Attention.apply(query, key, value, first)
