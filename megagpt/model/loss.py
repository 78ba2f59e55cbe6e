"""Cross entropy over a padded vocabulary that may be split over a tensor-parallel group.

`linear_cross_entropy` is the model's last step: hidden states and the output weight in, a loss per
token out, so that logits never reach the trainer and a fused kernel can take its place.
"""

# b micro-batch, s sequence, t = b*s tokens, h hidden, v padded vocabulary

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.parallel.collectives import copy_to_group
from megagpt.parallel.groups import Group, group_rank, group_size

IGNORE_INDEX = -100
"""Label of a token that does not count."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size, group):
        local = logits.shape[-1]
        first = group_rank(group) * local
        scores = logits.float()  # [t, v/tp]
        if scores is logits:
            scores = scores.clone()
        num_real = min(max(vocab_size - first, 0), local)
        scores[:, num_real:] = -torch.inf
        parallel = group_size(group) > 1
        largest = scores.max(dim=-1).values
        if parallel:
            # all-reduce over tp: local maxima -> the row's
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scores -= largest.unsqueeze(-1)
        index = targets - first
        elsewhere = (index < 0) | (index >= num_real)
        index = index.masked_fill(elsewhere, 0)
        target_score = scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        target_score = target_score.masked_fill(elsewhere, 0.0)
        probabilities = scores.exp_()
        total = probabilities.sum(dim=-1)
        if parallel:
            # all-reduces over tp: only the target's owner adds its score; partial sums -> full
            dist.all_reduce(target_score, group=group)
            dist.all_reduce(total, group=group)
        ignored = targets == IGNORE_INDEX
        probabilities /= total.unsqueeze(-1)
        ctx.save_for_backward(probabilities, index, elsewhere, ignored)
        ctx.dtype = logits.dtype
        return (total.log() - target_score).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_output):
        probabilities, index, elsewhere, ignored = ctx.saved_tensors
        scale = grad_output.float().masked_fill(ignored, 0.0).unsqueeze(-1)
        grad = probabilities * scale
        own = torch.where(elsewhere.unsqueeze(-1), 0.0, -scale)
        grad.scatter_add_(-1, index.unsqueeze(-1), own)
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_size: int, tp_group: Group
) -> torch.Tensor:
    """Per-token cross entropy over a vocabulary split across tensor-parallel ranks.

    Three all-reduces over tp (max, target logit, sum of exp); full logits are never gathered.

    Args:
        logits: [b, s, v/tp], any float dtype; reduced in float32. Not modified.
        targets: [b, s], int64, global token ids in [0, vocab_size), or IGNORE_INDEX.
        vocab_size: Real tokens; the padding up to v takes no part.
        tp_group: Group over which v is split; None for one rank.

    Returns:
        [b, s], float32, nats per token, 0 where ignored; equal on every rank of tp_group.

    Raises:
        ValueError: If logits and targets disagree in b or s.

    Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits are {list(logits.shape)} and targets {list(targets.shape)}; all but the last "
            "dim of logits must equal targets"
        )
    loss = _VocabParallelCrossEntropy.apply(
        logits.flatten(0, -2), targets.flatten(), vocab_size, tp_group
    )
    return loss.view(targets.shape)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: Group,
) -> torch.Tensor:
    """Cross entropy of hidden @ weight^T.

    Args:
        hidden: [b, s, h], the same on every rank of tp_group.
        weight: [v/tp, h].
        targets: [b, s], int64, as in `vocab_parallel_cross_entropy`.
        vocab_size: Real tokens of the padded vocabulary.
        tp_group: Group over which v is split; None for one rank.

    Returns:
        [b, s], float32, nats per token.
    """
    logits = F.linear(copy_to_group(hidden, tp_group), weight)  # [b, s, v/tp]
    return vocab_parallel_cross_entropy(logits, targets, vocab_size=vocab_size, tp_group=tp_group)
