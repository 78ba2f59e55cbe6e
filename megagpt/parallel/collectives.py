"""The collectives of tensor parallelism as autograd functions; without a group they do nothing.

Each is the transpose of its own backward. Where the residual stream is whole on every rank, a
parallel region is entered by `copy_to_group` and left by `reduce_from_group`; where it is split
over the sequence, by `gather_sequence` and `reduce_scatter_sequence`.

Sources: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (functions f and g);
Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2 (sequence parallelism).
"""

# b micro-batch, s sequence; "/tp" marks a local shard

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megagpt.parallel.groups import Group, group_size


def _all_reduce(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[b, s/tp, ..] -> [b, s, ..]."""
    shards = tensor.transpose(0, 1).contiguous()  # [s/tp, b, ..]
    size = group_size(group)
    whole = shards.new_empty(shards.shape[0] * size, *shards.shape[1:])
    dist.all_gather_into_tensor(whole, shards, group=group)
    return whole.transpose(0, 1).contiguous()


def _reduce_scatter(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Partial sums [b, s, ..] -> [b, s/tp, ..]."""
    parts = tensor.transpose(0, 1).contiguous()  # [s, b, ..]
    own = parts.new_empty(parts.shape[0] // group_size(group), *parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=group)
    return own.transpose(0, 1).contiguous()


class _WithTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, function, transpose):
        ctx.group, ctx.transpose = group, transpose
        return function(tensor, group)

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.transpose(grad_output, ctx.group), None, None, None


_Collective = Callable[[torch.Tensor, Group], torch.Tensor]


def _apply(
    tensor: torch.Tensor, group: Group, function: _Collective, transpose: _Collective
) -> torch.Tensor:
    if group_size(group) == 1:
        return tensor
    return _WithTranspose.apply(tensor, group, function, transpose)


def copy_to_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity forward, all-reduce backward: what every rank uses a part of."""
    # all-reduce over tp: each rank's part of the gradient -> the whole
    return _apply(tensor, group, lambda whole, _: whole.view_as(whole), _all_reduce)


def reduce_from_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """All-reduce forward, identity backward: partial sums -> full."""
    # all-reduce over tp: partial sums -> full
    return _apply(tensor, group, _all_reduce, lambda grad, _: grad)


def gather_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """All-gather of dim 1 forward, reduce-scatter backward; [b, s/tp, ..] -> [b, s, ..]."""
    # all-gather over tp: shards of the sequence -> the whole
    # reduce-scatter over tp: each rank's part of the gradient -> own shard of the sum
    return _apply(tensor, group, _all_gather, _reduce_scatter)


def reduce_scatter_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Reduce-scatter of dim 1 forward, all-gather backward; partial [b, s, ..] -> [b, s/tp, ..]."""
    # reduce-scatter over tp: partial sums -> own shard of the full sequence
    # all-gather over tp: shards of the gradient -> the whole
    return _apply(tensor, group, _reduce_scatter, _all_gather)
