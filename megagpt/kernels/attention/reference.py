"""The definition of attention: torch's, with a mask of [b, 1, s, s] where there are documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megagpt.kernels.attention.contract import Documents


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    """See `contract.Attention`."""
    mask = None
    if documents is not None:
        places = torch.arange(query.shape[1], device=query.device)
        is_seen = places >= documents.first.unsqueeze(-1)  # [b, s, s]: query, key
        mask = is_seen.tril_().unsqueeze(1)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [b, n or k, s, d]
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).contiguous()
