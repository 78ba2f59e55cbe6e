"""Cross entropy over a padded vocabulary that may be split over a tensor-parallel group.

`linear_cross_entropy` is the model's last step: hidden states and the output weight in, a loss per
token out, so that logits never reach the trainer and a fused kernel can take its place.
"""

# b micro-batch, s sequence, t = b*s tokens, h hidden, v padded vocabulary

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.model.layers import TensorParallel
from megagpt.parallel.groups import Group, group_rank, group_size

IGNORE_INDEX = -100
"""Label of a token that does not count."""


def _row_chunks(logits: torch.Tensor) -> list[slice]:
    """Rows to take at a time: on a CPU, as many as stay in its cache through all passes."""
    num_rows = logits.shape[0]
    step = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else num_rows
    return [slice(first, first + step) for first in range(0, num_rows, max(step, 1))]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a row; backward computes the probabilities again."""

    @staticmethod
    def forward(ctx, logits, targets, vocab_size, group):
        wide = torch.promote_types(logits.dtype, torch.float32)
        local = logits.shape[-1]
        first = group_rank(group) * local
        num_real = min(max(vocab_size - first, 0), local)
        real = logits[:, :num_real]  # [t, at most v/tp], without the padding
        parallel = group_size(group) > 1
        if num_real:
            largest = real.amax(dim=-1).to(wide)
        else:
            largest = logits.new_full(logits.shape[:1], -torch.inf, dtype=wide)
        if parallel:
            # all-reduce over tp: local maxima -> the row's
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        index = targets - first
        elsewhere = (index < 0) | (index >= num_real)
        index = index.masked_fill(elsewhere, 0)
        target_score = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1).to(wide) - largest
        target_score = target_score.masked_fill(elsewhere, 0.0)
        total = torch.empty_like(largest)
        for rows in _row_chunks(logits):
            # bf16 - fp32 gives fp32
            total[rows] = (real[rows] - largest[rows].unsqueeze(-1)).exp_().sum(dim=-1)
        if parallel:
            # all-reduces over tp: only the target's owner adds its score; partial sums -> full
            dist.all_reduce(target_score, group=group)
            dist.all_reduce(total, group=group)
        ignored = targets == IGNORE_INDEX
        log_total = total.log()
        ctx.save_for_backward(logits, largest + log_total, index, elsewhere, ignored)
        ctx.num_real = num_real
        return (log_total - target_score).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_output):
        logits, log_sum_exp, index, elsewhere, ignored = ctx.saved_tensors
        num_real = ctx.num_real
        grad = torch.empty_like(logits)
        grad[:, num_real:] = 0
        if num_real == 0:
            return grad, None, None, None
        scale = grad_output.to(log_sum_exp.dtype).masked_fill(ignored, 0.0).unsqueeze(-1)
        own = scale.masked_fill(elsewhere.unsqueeze(-1), 0.0).neg_()
        for rows in _row_chunks(logits):
            part = (logits[rows, :num_real] - log_sum_exp[rows].unsqueeze(-1)).exp_()
            part.mul_(scale[rows]).scatter_add_(-1, index[rows].unsqueeze(-1), own[rows])
            grad[rows, :num_real] = part
        return grad, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_size: int, tp_group: Group
) -> torch.Tensor:
    """Per-token cross entropy over a vocabulary split across tensor-parallel ranks.

    Three all-reduces over tp (max, target logit, sum of exp); full logits are never gathered.

    Args:
        logits: [b, s, v/tp], any float dtype; reduced in at least float32. Not modified.
        targets: [b, s], int64, global token ids in [0, vocab_size), or IGNORE_INDEX.
        vocab_size: Real tokens; the padding up to v takes no part.
        tp_group: Group over which v is split; None for one rank.

    Returns:
        [b, s], at least float32, nats per token, 0 where ignored; equal on every rank of tp_group.

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
    tp: TensorParallel,
) -> torch.Tensor:
    """Cross entropy of hidden @ weight^T.

    Args:
        hidden: [b, s, h], the same on every rank; [b, s/tp, h] under sequence parallelism.
        weight: [v/tp, h].
        targets: [b, s], int64, as in `vocab_parallel_cross_entropy`.
        vocab_size: Real tokens of the padded vocabulary.
        tp: Over which v is split, and hidden under sequence parallelism; targets are whole.

    Returns:
        [b, s], at least float32, nats per token.
    """
    logits = F.linear(tp.enter(hidden), weight)  # [b, s, v/tp]
    return vocab_parallel_cross_entropy(logits, targets, vocab_size=vocab_size, tp_group=tp.group)
