"""Rotary positions on a GPU: one launch over queries and keys, each way."""

# b micro-batch, s sequence, n query heads, k key heads, d head dim

from __future__ import annotations

import torch

from megagpt.kernels.triton_support import num_warps, power_of_two, triton_problem


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return triton_problem(device, dtype)


@torch.library.custom_op("megagpt::rotary", mutates_args=())
def _turned(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from megagpt.kernels.rotary import triton_kernels as kernels

    of_query, of_key = torch.empty_like(query), torch.empty_like(key)
    b, s, n, d = query.shape
    k = key.shape[2]
    blocks = power_of_two(n), power_of_two(k), power_of_two(d // 2)
    kernels.turn[(b * s,)](
        *(query, key, cos, sin, of_query, of_key, cos.shape[0] * s, n, k, d // 2),
        SIGN=int(sign),
        QUERY_BLOCK=blocks[0],
        KEY_BLOCK=blocks[1],
        HALF=blocks[2],
        num_warps=num_warps(blocks[0] * blocks[2]),
    )
    return of_query, of_key


@_turned.register_fake
def _(query, key, cos, sin, sign):
    return torch.empty_like(query), torch.empty_like(key)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(query.contiguous(), key.contiguous(), cos, sin, 1.0)

    @staticmethod
    def backward(ctx, of_query, of_key):
        turned = _turned(of_query.contiguous(), of_key.contiguous(), *ctx.saved_tensors, -1.0)
        return *turned, None, None


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `contract.Rotary`."""
    return _Rotary.apply(query, key, cos, sin)
