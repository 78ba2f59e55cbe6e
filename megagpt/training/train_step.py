"""One optimizer step and one evaluation, with the loss normalised by the global token count.

Next file: `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from megagpt.model.loss import IGNORE_INDEX
from megagpt.training.engine import optimizer_step

# b micro-batch, s sequence
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank."""

    loss: float
    """Nats per valid token of the global batch, before the update."""
    num_tokens: int
    """Valid tokens of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""


def _sum_over_ranks(*values: float | torch.Tensor, device: torch.device) -> list[float]:
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    if dist.get_world_size() > 1:
        # all-reduce over dp: each rank's sums -> sums of the global batch
        dist.all_reduce(total)
    return total.tolist()


def train_step(
    engine: deepspeed.DeepSpeedEngine, batches: list[Batch], *, lr: float, clip_grad: float
) -> StepResult:
    """Forward, backward and update over the step's micro-batches.

    Args:
        engine: In training mode.
        batches: This rank's micro-batches, each (tokens [b, s], labels [b, s]).
        lr: Learning rate of this step.
        clip_grad: Largest global gradient norm; 0 is off.

    Returns:
        Loss, tokens and gradient norm of the global batch.
    """
    engine.train()
    local_tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
    (num_tokens,) = _sum_over_ranks(local_tokens, device=engine.device)
    # DeepSpeed divides by the accumulation steps and averages over dp; we want sum / count.
    scale = len(batches) * dist.get_world_size() / num_tokens
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for index, (tokens, labels) in enumerate(batches):
        loss = engine(tokens.to(engine.device), labels.to(engine.device)).sum()
        loss_sum += loss.detach()
        engine.backward(loss * scale)
        if index < len(batches) - 1:
            engine.step()  # not at a boundary: counts the micro-batch
    grad_norm = optimizer_step(engine, lr=lr, clip_grad=clip_grad)
    (total,) = _sum_over_ranks(loss_sum, device=engine.device)
    return StepResult(loss=total / num_tokens, num_tokens=int(num_tokens), grad_norm=grad_norm)


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch]) -> float:
    """Mean loss over all valid tokens, in nats: a ratio of sums, never a mean of means.

    Args:
        engine: Any engine; left in evaluation mode.
        batches: This rank's share; every rank must have the same number.
    """
    engine.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    num_tokens = 0
    for tokens, labels in batches:
        loss_sum += engine(tokens.to(engine.device), labels.to(engine.device)).sum()
        num_tokens += int((labels != IGNORE_INDEX).sum())
    total, count = _sum_over_ranks(loss_sum, num_tokens, device=engine.device)
    return total / count
