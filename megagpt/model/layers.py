"""Linear layers and embedding split over a tensor-parallel group that is handed in.

A parallel region is entered once (`TensorParallel.enter`), serves as many column-parallel layers
as share its input, and is left by a row-parallel one. Parameters are created empty;
`initialization.py` gives them their values by global name.
Sources: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; for sequence
parallelism Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.
"""

# b micro-batch, s sequence, v padded vocabulary; "/tp" marks a local shard, s/tp only under
# sequence parallelism

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.parallel.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
)
from megagpt.parallel.groups import Group, group_rank, group_size


@dataclass(frozen=True)
class TensorParallel:
    """How layers are split over ranks."""

    group: Group = None
    """Over which weights are split; None for one rank."""
    sequence_parallel: bool = False
    """Whether the residual stream is split over s, on the same group."""

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return group_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return group_rank(self.group)

    @property
    def stream_group(self) -> Group:
        """Over which the residual stream is split; None where it is whole on every rank."""
        return self.group if self.sequence_parallel else None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream -> the input of column-parallel layers, [b, s, ..] on every rank."""
        return (gather_sequence if self.sequence_parallel else copy_to_group)(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums [b, s, ..] -> the residual stream, [b, s, ..] or [b, s/tp, ..]."""
        reduce = reduce_scatter_sequence if self.sequence_parallel else reduce_from_group
        return reduce(x, self.group)

    def shard(self, size: int, name: str) -> int:
        """A rank's share of a size; raises ValueError if there is none."""
        if size % self.size:
            raise ValueError(
                f"{name}={size} is not divisible by tensor_parallel_size={self.size}; "
                "choose a tensor_parallel_size that divides it"
            )
        return size // self.size


ONE_RANK = TensorParallel()
"""Layers whole on one rank."""


def empty_parameter(*shape: int, tp_dim: int | None = None) -> nn.Parameter:
    """An uninitialised parameter of a local shape.

    Args:
        *shape: On this rank.
        tp_dim: The dim that tp splits; without it every rank holds the same whole parameter, and
            whoever uses a part of it sums the parts of its gradient inside autograd.
    """
    parameter = nn.Parameter(torch.empty(*shape))
    if tp_dim is not None:
        parameter.tp_dim = tp_dim  # type: ignore[attr-defined]
        # DeepSpeed's name: its gradient norm counts unmarked parameters on one tp rank only.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (outputs) split over tp.

    Args:
        in_features: Width of the input.
        out_features: Width of the output over all ranks; divisible by tp.
        bias: Whether there is one; split like the output.
        tp: Over which outputs are split.

    Raises:
        ValueError: If tp does not divide out_features.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        local = tp.shard(out_features, "out_features")
        self.weight = empty_parameter(local, in_features, tp_dim=0)
        self.bias = empty_parameter(local, tp_dim=0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, in] inside a parallel region -> [b, s, out/tp]; no collective."""
        return F.linear(x, self.weight, self.bias)


class SharedColumnLinear(nn.Module):
    """A column-parallel layer with fewer output blocks than ranks: tp / num_blocks ranks share one.

    The weight is whole on every rank, which multiplies by the rows of its own block; the parts of
    the gradient are summed over tp. For key/value heads fewer than tp.

    Args:
        in_features: Width of the input.
        block_size: Width of the output, one block.
        num_blocks: Blocks of the weight; divides tp.
        bias: Whether there is one.
        tp: Whose ranks share the blocks.
    """

    def __init__(
        self, in_features: int, block_size: int, *, num_blocks: int, bias: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp = tp
        block = tp.rank * num_blocks // tp.size
        self.rows = slice(block * block_size, (block + 1) * block_size)
        self.weight = empty_parameter(num_blocks * block_size, in_features)
        self.bias = empty_parameter(num_blocks * block_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, in] inside a parallel region -> [b, s, block_size]."""
        weight = copy_to_group(self.weight, self.tp.group)[self.rows]
        bias = None if self.bias is None else copy_to_group(self.bias, self.tp.group)[self.rows]
        return F.linear(x, weight, bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W (inputs) split over tp; leaves the parallel region.

    Args:
        in_features: Width of the input over all ranks; divisible by tp.
        out_features: Width of the output.
        bias: Whether there is one; replicated.
        tp: Over which the input is split.

    Raises:
        ValueError: If tp does not divide in_features.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp = tp
        local = tp.shard(in_features, "in_features")
        self.weight = empty_parameter(out_features, local, tp_dim=1)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, in/tp] -> [b, s, out], the same on every rank, or [b, s/tp, out]."""
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)  # [b, s, out], a partial sum
        y = self.tp.leave(y)
        if self.bias is None:
            return y
        # Row-parallel bias is added after the all-reduce; before it, it would count tp times.
        # Under sequence parallelism it sees a part of the tokens only.
        return y + copy_to_group(self.bias, self.tp.stream_group)


class VocabParallelEmbedding(nn.Module):
    """Embedding whose rows (the padded vocabulary) are split over tp.

    Args:
        num_embeddings: Rows over all ranks; divisible by tp.
        embedding_size: Width.
        tp: Over which rows are split.
    """

    def __init__(self, num_embeddings: int, embedding_size: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        local = tp.shard(num_embeddings, "num_embeddings")
        self.first = tp.rank * local
        self.weight = empty_parameter(local, embedding_size, tp_dim=0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s] global token ids -> [b, s, h], the same on every rank, or [b, s/tp, h]."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first  # [b, s]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        # reduce: exactly one rank has each row, the others add zero
        return self.tp.leave(rows)
