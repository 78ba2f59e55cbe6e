"""The collectives of tensor parallelism as autograd functions; without a group they do nothing.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (functions f and g).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megagpt.parallel.groups import Group, group_rank, group_size


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output):
        # all-reduce over tp: each rank's part of the gradient -> the whole
        grad = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        # all-reduce over tp: partial sums -> full
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(group_size(group))]
        # all-gather over tp: shards of the last dim -> full
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad_output):
        shards = grad_output.chunk(group_size(ctx.group), dim=-1)
        return shards[group_rank(ctx.group)].contiguous(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.chunk(group_size(group), dim=-1)[group_rank(group)].contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        grad_output = grad_output.contiguous()
        parts = [torch.empty_like(grad_output) for _ in range(group_size(ctx.group))]
        # all-gather over tp: shards of the gradient's last dim -> full
        dist.all_gather(parts, grad_output, group=ctx.group)
        return torch.cat(parts, dim=-1), None


def copy_to_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity forward, all-reduce backward: the input of a column-parallel layer."""
    return tensor if group_size(group) == 1 else _Copy.apply(tensor, group)


def reduce_from_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """All-reduce forward, identity backward: the output of a row-parallel layer."""
    return tensor if group_size(group) == 1 else _Reduce.apply(tensor, group)


def gather_from_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """All-gather of the last dim forward, own slice backward; [.., n/tp] -> [.., n]."""
    return tensor if group_size(group) == 1 else _Gather.apply(tensor, group)


def scatter_to_group(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Own slice of the last dim forward, all-gather backward; [.., n] -> [.., n/tp]."""
    return tensor if group_size(group) == 1 else _Scatter.apply(tensor, group)
