"""Attention on a GPU by torch's flash kernels: none of them holds [s, s], nor a mask of it.

With documents each is a sequence of its own (`varlen_attn`). fp32 has the memory-efficient kernel
only, which knows no grouped queries: keys and values are repeated for it.
"""

# b micro-batch, s sequence, n query heads, k key/value heads, d head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from megagpt.kernels.attention.contract import Documents

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MOST_HEAD_SIZE = 256


def problem(device: torch.device, dtype: torch.dtype, *, head_size: int, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    if device.type != "cuda":
        return f"it is for GPUs, not {device.type}"
    if dtype not in (*_LOW_PRECISION, torch.float32):
        return f"torch's kernels know bf16, fp16 and fp32, not {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > _MOST_HEAD_SIZE:
        return f"head_size={head_size} is not a multiple of 8 up to {_MOST_HEAD_SIZE}"
    return None


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    """See `contract.Attention`."""
    b, s, n, d = query.shape
    is_grouped = n != key.shape[2]
    if documents is not None and query.dtype in _LOW_PRECISION:
        attended = varlen_attn(
            query.flatten(0, 1),  # [b*s, n, d]
            key.flatten(0, 1),  # [b*s, k, d]
            value.flatten(0, 1),
            documents.offsets,
            documents.offsets,
            max_q=s,
            max_k=s,
            window_size=(-1, 0),  # causal
            enable_gqa=is_grouped,
        )
        assert isinstance(attended, torch.Tensor)  # no more was asked for
        return attended.view(b, s, n, d)
    if is_grouped and query.dtype not in _LOW_PRECISION:
        key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
        is_grouped = False
    mask = None
    if documents is not None:  # fp32: no kernel of torch's has both documents and this type
        places = torch.arange(s, device=query.device)
        mask = (places >= documents.first.unsqueeze(-1)).tril_().unsqueeze(1)  # [b, 1, s, s]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
    )
    return attended.transpose(1, 2).contiguous()
