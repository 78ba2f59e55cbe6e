"""The definition of linear + cross entropy, in differentiable torch; logits are whole.

Over a split vocabulary three all-reduces, whose backward autograd writes: the largest logit is a
constant, the two sums hand each rank the gradient as it is.
"""

# t tokens, h hidden, v padded vocabulary; "/tp" local

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.kernels.linear_cross_entropy.contract import IGNORE_INDEX, Vocabulary


class _Sum(torch.autograd.Function):
    """All-reduce over the group; every rank's loss is the same one, so backward is the identity."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.clone()
        # all-reduce over tp: partial sums -> full
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary: Vocabulary,
    z_loss: float = 0.0,
    gradient: float = 1.0,
) -> torch.Tensor:
    """See `contract.LinearCrossEntropy`; gradient is not needed here."""
    logits = F.linear(hidden, weight)  # [t, v/tp]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    real = logits[:, : vocabulary.num_real(weight.shape[0])]
    largest = logits.new_full(targets.shape, -torch.inf)
    if real.shape[1]:
        largest = real.detach().amax(dim=-1)
    index = targets - vocabulary.first
    elsewhere = (index < 0) | (index >= real.shape[1])
    index = index.masked_fill(elsewhere, 0).unsqueeze(-1)
    if vocabulary.group is not None:
        # all-reduce over tp: local maxima -> the row's
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=vocabulary.group)
    total = (real - largest.unsqueeze(-1)).exp().sum(dim=-1)
    score = logits.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)
    if vocabulary.group is not None:
        total, score = _Sum.apply(torch.stack([total, score]), vocabulary.group)
    log_sum_exp = largest + total.log()
    loss = log_sum_exp - score + z_loss * log_sum_exp.square()
    return loss.masked_fill(targets == IGNORE_INDEX, 0.0)
