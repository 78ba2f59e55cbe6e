"""Causal self-attention with grouped queries and rotary positions, heads split over tp."""

# b micro-batch, s sequence, h hidden, n query heads, k key/value heads, d head dim; "/tp" local

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.layers import ColumnParallelLinear, RowParallelLinear
from megagpt.model.norm import build_norm
from megagpt.parallel.groups import Group, group_size


class KVCache:
    """Keys and values of the tokens so far, a pair of [b, k, s, d] for each layer."""

    def __init__(self, num_layers: int) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.pairs[0] is None else self.pairs[0][0].shape[2]

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [b, k, new, d] and returns all."""
        held = self.pairs[layer]
        if held is not None:
            key, value = torch.cat([held[0], key], dim=2), torch.cat([held[1], value], dim=2)
        self.pairs[layer] = (key, value)
        return key, value


def rotary_tables(
    position_ids: torch.Tensor, head_size: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions.

    Args:
        position_ids: [s] or [b, s], int64.
        head_size: d, even.
        theta: Base of the frequencies.
        dtype: Of the result; computed in float32.

    Returns:
        Two [1 or b, 1, s, d].

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in Llama's half-split form.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = 1.0 / theta ** (exponents / head_size)  # [d/2]
    angles = position_ids.float().unsqueeze(-1) * frequencies  # [.., s, d/2]
    angles = torch.cat([angles, angles], dim=-1)
    angles = angles.unsqueeze(-3) if angles.dim() == 3 else angles[None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns [b, n, s, d] by its positions."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Self-attention of one block.

    Args:
        config: Model shape.
        layer: Index of the block, for the KV cache.
        tp_group: Group over which heads are split; None for one rank.
    """

    def __init__(self, config: ModelConfig, *, layer: int, tp_group: Group) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        tp = group_size(tp_group)
        if config.kv_heads % tp:
            raise ValueError(
                f"num_kv_heads={config.kv_heads} is not divisible by tensor_parallel_size={tp}; "
                "choose a tensor_parallel_size that divides it"
            )
        h, kv_width = config.hidden_size, config.kv_heads * config.head_size
        self.query = ColumnParallelLinear(h, h, bias=config.bias, tp_group=tp_group)
        self.key = ColumnParallelLinear(h, kv_width, bias=config.bias, tp_group=tp_group)
        self.value = ColumnParallelLinear(h, kv_width, bias=config.bias, tp_group=tp_group)
        self.output = RowParallelLinear(h, h, bias=config.bias, tp_group=tp_group)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = build_norm(config, config.head_size, split_group=tp_group)
            self.key_norm = build_norm(config, config.head_size, split_group=tp_group)
        self.grouped = config.kv_heads != config.num_attention_heads

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; with a cache, s counts the new tokens only."""
        b, s, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(b, s, -1, self.head_size)

        query, key = heads(self.query(x)), heads(self.key(x))  # [b, s, n/tp, d], [b, s, k/tp, d]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [b, n/tp, s, d]
        value = heads(self.value(x)).transpose(1, 2)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        mask = None
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
            total = key.shape[2]
            # New token i sees everything up to itself, at position total - s + i.
            mask = torch.ones(s, total, dtype=torch.bool, device=x.device).tril(total - s)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.output(attended.transpose(1, 2).reshape(b, s, -1))
