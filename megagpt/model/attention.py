"""Causal self-attention with grouped queries and rotary positions, heads split over tp.

Attention and positions stay within documents where position ids restart at 0.
"""

# b micro-batch, s sequence, h hidden, n query heads, k key/value heads, d head dim; "/tp" local

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.kernels.attention.contract import Documents
from megagpt.kernels.dropout.contract import Dropout
from megagpt.kernels.dropout.reference import dropout
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.model.dropout import Site, keyed_dropout
from megagpt.model.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedColumnLinear,
    TensorParallel,
)
from megagpt.model.norm import Norm
from megagpt.parallel.groups import Group, group_rank


class KVCache:
    """Keys and values of the tokens so far, in memory that is doubled where it ends."""

    def __init__(self, num_layers: int) -> None:
        self._memory: list[torch.Tensor | None] = [None] * num_layers  # [2, b, k, capacity, d]
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._lengths[0]

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [b, k, new, d] and returns all."""
        held, begin = self._memory[layer], self._lengths[layer]
        end = self._lengths[layer] = begin + key.shape[2]
        if held is None or end > held.shape[3]:
            *lead, _, size = key.shape
            memory = key.new_empty(2, *lead, 2 * end, size)
            if held is not None:
                memory[:, :, :, :begin] = held[:, :, :, :begin]
            held = self._memory[layer] = memory
        held[0, :, :, begin:end], held[1, :, :, begin:end] = key, value
        return held[0, :, :, :end], held[1, :, :, :end]


def rotary_tables(
    position_ids: torch.Tensor, head_size: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions.

    Args:
        position_ids: [s] or [b, s], int64.
        head_size: d, even.
        theta: Base of the frequencies.
        dtype: Of the result; computed in at least float32.

    Returns:
        Two [1 or b, s, d/2].

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in Llama's half-split form.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_size, 2, dtype=wide, device=position_ids.device)
    frequencies = 1.0 / theta ** (exponents / head_size)  # [d/2]
    angles = torch.atleast_2d(position_ids).to(wide).unsqueeze(-1) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True)
class SequenceContext:
    """What all blocks of one forward pass share."""

    positions: torch.Tensor
    """[s] or [b, s], int64."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """From `rotary_tables`, for the whole sequence; None without rotary positions."""
    documents: Documents | None = None
    """Within which attention stays; None: each sample is one."""
    dropout_keys: torch.Tensor | None = None
    """[b], from `dropout_keys`; None drops nothing."""
    dropout_probability: float = 0.0
    """Of dropping an element."""
    dropout: Dropout = dropout
    """The back end."""
    stream_group: Group = None
    """Over which the residual stream is split, see `TensorParallel`."""
    cache: KVCache | None = None
    """Keys and values of earlier tokens, in inference."""

    def drop(self, x: torch.Tensor, *, layer: int, site: Site) -> torch.Tensor:
        """Dropout of the residual stream, [b, s, h] or [b, s/tp, h]."""
        return keyed_dropout(
            x,
            self.dropout_keys,
            probability=self.dropout_probability,
            layer=layer,
            site=site,
            dropout=self.dropout,
            sequence_start=group_rank(self.stream_group) * x.shape[1],
        )


class Attention(nn.Module):
    """Self-attention of one block.

    Args:
        config: Model shape.
        tp: Over which heads are split; key/value heads fewer than its ranks are shared by them.
        layer: Index of the block, for the KV cache.
        kernels: Chooses those of rotary positions and per-head norms.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        *,
        layer: int,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.tp = tp
        h = config.hidden_size
        self.query = ColumnParallelLinear(h, h, bias=config.bias, tp=tp)
        self.key = _key_or_value(config, tp)
        self.value = _key_or_value(config, tp)
        self.output = RowParallelLinear(h, h, bias=config.bias, tp=tp)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            per_head = partial(Norm, config, config.head_size, split_group=tp.group)
            self.query_norm, self.key_norm = per_head(kernels=kernels), per_head(kernels=kernels)
        if config.position_embedding == "rope":
            self.rotary = kernels.choose("rotary", head_size=config.head_size)
        self.attend = kernels.choose("attention", head_size=config.head_size)

    def forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h], s/tp under sequence parallelism.

        With a cache, s counts the new tokens only.
        """
        x = self.tp.enter(x)
        b, s, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(b, s, -1, self.head_size)

        query, key = heads(self.query(x)), heads(self.key(x))  # [b, s, n/tp, d], [b, s, k/tp, d]
        if self.query_norm is not None and self.key_norm is not None:
            (query, _), (key, _) = self.query_norm(query), self.key_norm(key)
        if context.rotary is not None:
            query, key = self.rotary(query, key, *context.rotary)
        value = heads(self.value(x))
        if context.cache is None:
            attended = self.attend(query, key, value, context.documents)
        else:
            attended = self._attend_to_cache(query, key, value, context.cache)
        return self.output(attended.view(b, s, -1))

    def _attend_to_cache(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """New tokens, [b, s, n or k, d], see themselves and all that the cache holds."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        key, value = cache.extend(self.layer, key, value)
        s, total = query.shape[2], key.shape[2]
        # New token i sees everything up to itself, at position total - s + i.
        mask = torch.ones(s, total, dtype=torch.bool, device=query.device).tril(total - s)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.transpose(1, 2).contiguous()


def _key_or_value(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    """The key or value projection: split over tp, or shared where heads are fewer than ranks."""
    h, kv_heads = config.hidden_size, config.kv_heads
    if kv_heads % tp.size == 0:
        return ColumnParallelLinear(h, kv_heads * config.head_size, bias=config.bias, tp=tp)
    if tp.size % kv_heads:
        raise ValueError(
            f"num_kv_heads={kv_heads} and tensor_parallel_size={tp.size}: neither divides the "
            "other; choose a tensor_parallel_size that divides it, or a multiple of it"
        )
    return SharedColumnLinear(h, config.head_size, num_blocks=kv_heads, bias=config.bias, tp=tp)
