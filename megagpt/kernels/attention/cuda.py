"""Attention on a GPU by torch's flash kernels: none of them holds [s, s], nor a mask of it.

With documents each is a sequence of its own (`varlen_attn`). fp32 has the memory-efficient kernel
only, which knows no grouped queries: keys and values are repeated for it.
"""

# b micro-batch, s sequence, n query heads, k key/value heads, d head dim

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

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


@lru_cache
def _varlen() -> tuple[Callable[..., Any], dict[str, Any], bool] | None:
    """Torch's variable-length attention, what makes it causal, whether it knows grouped queries.

    None before torch 2.10. Its arguments have changed since: `is_causal` became `window_size`, and
    `enable_gqa` came.
    """
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ModuleNotFoundError:
        return None
    names = inspect.signature(function).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return function, causal, "enable_gqa" in names


def _repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """[b, s, k, d] -> [b, s, n, d]: each key or value head once for each of its queries'."""
    return heads.repeat_interleave(times, dim=2)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    """See `contract.Attention`."""
    b, s, n, d = query.shape
    times = n // key.shape[2]
    varlen = _varlen() if documents is not None and query.dtype in _LOW_PRECISION else None
    if documents is not None and varlen is not None:
        function, options, knows_groups = varlen
        if times > 1 and not knows_groups:
            key, value, times = _repeated(key, times), _repeated(value, times), 1
        if times > 1:
            options = {**options, "enable_gqa": True}
        packed = (x.flatten(0, 1) for x in (query, key, value))  # [b*s, n or k, d]
        offsets = documents.offsets
        return function(*packed, offsets, offsets, s, s, **options).view(b, s, n, d)
    if times > 1 and query.dtype not in _LOW_PRECISION:
        key, value, times = _repeated(key, times), _repeated(value, times), 1
    mask = None
    if documents is not None:  # no kernel of torch's has both documents and this type
        places = torch.arange(s, device=query.device)
        mask = (places >= documents.first.unsqueeze(-1)).tril_().unsqueeze(1)  # [b, 1, s, s]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=times > 1
    )
    return attended.transpose(1, 2).contiguous()
