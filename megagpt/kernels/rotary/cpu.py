"""Rotary positions on a CPU: one pass over queries and one over keys, each way."""

# b micro-batch, s sequence, n heads, d head dim

from __future__ import annotations

import torch

from megagpt.kernels.native import FLOAT, POINTER, SIZE, Library, at

_LIBRARY = Library(
    __file__,
    {
        "rotary_turn": [POINTER] * 4 + [SIZE] * 4 + [FLOAT],
    },
)


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """[b, s, n, d], turned forward (sign 1) or back (-1)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    b, s, n, d = x.shape
    _LIBRARY.call(
        "rotary_turn",
        x.dtype,
        at(x),
        at(cos),
        at(sin),
        at(out),
        b * s,
        n,
        d // 2,
        cos.shape[0] * s,
        sign,
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(query, cos, sin, 1.0), _turned(key, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, of_query, of_key):
        cos, sin = ctx.saved_tensors
        return _turned(of_query, cos, sin, -1.0), _turned(of_key, cos, sin, -1.0), None, None


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.Rotary`."""
    return _Rotary.apply(query, key, cos, sin)
