"""Linear + cross entropy in a few chunks of tokens, over the row passes of a back end.

The forward pass turns each chunk's logits into their gradient at once: for that it needs to know
what backward will be handed. The trainer tells (`gradient`); where it is told something else,
backward scales what is there, and where tokens get different ones, it makes the chunks again.
"""

# t tokens, c tokens of a chunk, h hidden, v padded vocabulary; "/tp" local

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.kernels.linear_cross_entropy.contract import IGNORE_INDEX, RowPasses, Vocabulary

MIN_CHUNK, MAX_CHUNKS = 1024, 8
"""Tokens of a chunk at least, so that its products are large ones; chunks at most."""
_SAME = 1e-6
"""Relative difference of two gradients that only rounding sets apart."""


def chunks(num_tokens: int) -> Iterator[slice]:
    """Consecutive parts of the tokens, of one size but for the last."""
    size = max(MIN_CHUNK, -(-num_tokens // MAX_CHUNKS))
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


def log_sum_exp_and_score(
    statistics: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's logsumexp over the whole vocabulary, and its target's logit, from every rank's.

    Args:
        statistics: [3, c], of `RowPasses.statistics`.
        group: Over which the vocabulary is split.
    """
    parts = statistics
    if group is not None:
        num_tokens = statistics.shape[1]
        parts = statistics.new_empty(3 * dist.get_world_size(group), num_tokens)
        # all-gather over tp: each rank's three numbers a row -> all of them
        dist.all_gather_into_tensor(parts, statistics, group=group)
    largest, total, score = parts.unflatten(0, (-1, 3)).unbind(dim=1)  # [tp, c]
    top = largest.amax(dim=0)
    return top + (total * (largest - top).exp()).sum(dim=0).log(), score.sum(dim=0)


class ChunkedLinearCrossEntropy:
    """See `contract.LinearCrossEntropy`.

    Args:
        rows: The back end's passes.
    """

    def __init__(self, rows: RowPasses) -> None:
        self._rows = rows

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        vocabulary: Vocabulary,
        z_loss: float = 0.0,
        gradient: float = 1.0,
    ) -> torch.Tensor:
        """As there."""
        with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _ChunkedLinearCrossEntropy.apply(
            hidden, weight, targets, vocabulary, z_loss, gradient, self._rows, with_grad
        )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocabulary, z_loss, gradient, rows, with_grad):
        num_real = vocabulary.num_real(weight.shape[0])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ignored = targets == IGNORE_INDEX
        index = targets - vocabulary.first
        index = index.masked_fill((index >= num_real) | ignored, -1)
        loss = torch.empty(targets.shape, dtype=wide, device=hidden.device)
        log_sum_exp = torch.empty_like(loss)
        ctx.arguments = (vocabulary, z_loss, gradient, rows)
        grads = _Gradients(hidden, weight, rows) if with_grad else None
        for chunk in chunks(targets.shape[0]):
            logits = F.linear(hidden[chunk], weight)  # [c, v/tp]
            statistics = rows.statistics(logits, index[chunk], num_real)
            lse, score = log_sum_exp_and_score(statistics, vocabulary.group)
            log_sum_exp[chunk] = lse
            loss[chunk] = lse - score + z_loss * lse.square()
            if grads is not None:
                scale = torch.full_like(lse, gradient).masked_fill_(ignored[chunk], 0.0)
                _to_gradients_(logits, index[chunk], lse, scale, z_loss, num_real, rows)
                grads.add(chunk, logits)
            del logits  # before the next chunk makes its own
        if grads is not None:
            ctx.save_for_backward(hidden, weight, index, ignored, log_sum_exp)
            ctx.grads = grads.finished()
        return loss.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_output):
        vocabulary, z_loss, gradient, rows = ctx.arguments
        hidden, weight, index, ignored, log_sum_exp = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is not None and all(stride == 0 for stride in grad_output.stride()):
            rows.scale_unless_one_(grads, grad_output.flatten()[0] / gradient, _SAME)
            return *grads, None, None, None, None, None, None
        # Tokens with gradients of their own, or a second backward pass.
        del grads
        num_real = vocabulary.num_real(weight.shape[0])
        again = _Gradients(hidden, weight, rows)
        for chunk in chunks(index.shape[0]):
            logits = F.linear(hidden[chunk], weight)
            lse = log_sum_exp[chunk]
            scale = grad_output[chunk].to(lse.dtype).masked_fill(ignored[chunk], 0.0)
            _to_gradients_(logits, index[chunk], lse, scale, z_loss, num_real, rows)
            again.add(chunk, logits)
            del logits
        return *again.finished(), None, None, None, None, None, None


def _to_gradients_(logits, index, lse, scale, z_loss, num_real, rows) -> None:
    """Logits -> gradient of the loss, times scale."""
    # d/dlogit of lse - score + z * lse^2
    rows.gradients_(logits, index, lse, scale * (1.0 + 2.0 * z_loss * lse), scale, num_real)


class _Gradients:
    """Collects those of hidden and weight over the chunks, the weight's in at least float32."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, rows: RowPasses) -> None:
        self._hidden, self._weight, self._rows = hidden, weight, rows
        self._of_hidden = torch.empty_like(hidden)
        self._of_weight: torch.Tensor | None = None

    def add(self, chunk: slice, of_logits: torch.Tensor) -> None:
        """Takes the gradient of a chunk's logits, [c, v/tp]."""
        torch.mm(of_logits, self._weight, out=self._of_hidden[chunk])
        part = of_logits.t() @ self._hidden[chunk]  # [v/tp, h]
        if self._of_weight is None:
            is_last = chunk.stop == len(self._hidden)
            wide = torch.promote_types(part.dtype, torch.float32)
            self._of_weight = part if is_last else part.to(wide)
        else:
            self._rows.accumulate_(self._of_weight, part)

    def finished(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden and weight, of their type."""
        of_weight = self._of_weight
        if of_weight is None:  # no tokens
            of_weight = torch.zeros_like(self._weight)
        return self._of_hidden, of_weight.to(self._weight.dtype)
