"""Linear layers and embedding split over a tensor-parallel group that is handed in.

Parameters are created empty; `initialization.py` gives them their values by global name.
`tp_dim` on a parameter is the dim that is split (absent: replicated).
Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

# b micro-batch, s sequence, v padded vocabulary; "/tp" marks a local shard

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.parallel.collectives import copy_to_group, gather_from_group, reduce_from_group
from megagpt.parallel.groups import Group, group_rank, group_size


def _shard(size: int, name: str, group: Group) -> int:
    tp = group_size(group)
    if size % tp:
        raise ValueError(
            f"{name}={size} is not divisible by tensor_parallel_size={tp}; "
            "choose a tensor_parallel_size that divides it"
        )
    return size // tp


def empty_parameter(*shape: int, tp_dim: int | None = None) -> nn.Parameter:
    """An uninitialised parameter of a local shape, marked with the dim that tp splits."""
    parameter = nn.Parameter(torch.empty(*shape))
    if tp_dim is not None:
        parameter.tp_dim = tp_dim  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (outputs) split over tp.

    Args:
        in_features: Width of the input.
        out_features: Width of the output over all ranks; divisible by tp.
        bias: Whether there is one; it is split like the output.
        tp_group: Group over which the output is split; None for one rank.
        gather_output: Return [.., out] on every rank rather than [.., out/tp].

    Raises:
        ValueError: If tp does not divide out_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp_group: Group,
        gather_output: bool = False,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.gather_output = gather_output
        local = _shard(out_features, "out_features", tp_group)
        self.weight = empty_parameter(local, in_features, tp_dim=0)
        self.bias = empty_parameter(local, tp_dim=0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in], the same on every rank -> [.., out/tp], or [.., out] if gathered."""
        y = F.linear(copy_to_group(x, self.tp_group), self.weight, self.bias)
        return gather_from_group(y, self.tp_group) if self.gather_output else y


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W (inputs) split over tp.

    Args:
        in_features: Width of the input over all ranks; divisible by tp.
        out_features: Width of the output.
        bias: Whether there is one; replicated.
        tp_group: Group over which the input is split; None for one rank.

    Raises:
        ValueError: If tp does not divide in_features.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp_group: Group) -> None:
        super().__init__()
        self.tp_group = tp_group
        local = _shard(in_features, "in_features", tp_group)
        self.weight = empty_parameter(out_features, local, tp_dim=1)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in/tp] -> [.., out], the same on every rank."""
        if group_size(self.tp_group) == 1:
            return F.linear(x, self.weight, self.bias)
        y = reduce_from_group(F.linear(x, self.weight), self.tp_group)
        # Row-parallel bias is added after the all-reduce; before it, it would count tp times.
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Embedding whose rows (the padded vocabulary) are split over tp.

    Args:
        num_embeddings: Rows over all ranks; divisible by tp.
        embedding_size: Width.
        tp_group: Group over which rows are split; None for one rank.
    """

    def __init__(self, num_embeddings: int, embedding_size: int, *, tp_group: Group) -> None:
        super().__init__()
        self.tp_group = tp_group
        local = _shard(num_embeddings, "num_embeddings", tp_group)
        self.first = group_rank(tp_group) * local
        self.weight = empty_parameter(local, embedding_size, tp_dim=0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s] global token ids -> [b, s, h], the same on every rank."""
        if group_size(self.tp_group) == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first  # [b, s]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        # reduce: exactly one rank has each row, the others add zero
        return reduce_from_group(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp_group)
