"""One optimizer step and one evaluation, with the loss normalised by the global token count.

With and without pipeline. Next files: `batches.py`, `engine.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from megagpt.monitor.progress import Progress
from megagpt.parallel.groups import ProcessGroups
from megagpt.training.batches import MicroBatch
from megagpt.training.engine import expect_gradient, set_learning_rate

_PIPELINE_CHUNK, _CHUNK = 32, 8
"""Micro-batches that an evaluation takes, with and without pipeline, before it looks up."""


class Notices(NamedTuple):
    """What a rank has to tell the others after a step; of all together: whether any of them has."""

    is_late: bool = False
    """The time that the run was given is over."""
    is_told: bool = False
    """The process was told to stop."""
    has_save_failed: bool = False
    """A save in the background has failed."""


class Message(NamedTuple):
    """What a rank adds to the sum that ends a step."""

    next_tokens: int = 0
    """Valid tokens of its part of the next global batch."""
    notices: Notices = Notices()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank."""

    loss: float
    """Nats per valid token of the global batch, before the update; 0 where it has none."""
    num_tokens: int
    """Valid tokens of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    num_pairs: int = 0
    """Pairs of a query and a key that attention computed with, by `MicroBatch.num_pairs`."""
    next_tokens: int = 0
    """Valid tokens of the next global batch, as the ranks' messages told."""
    notices: Notices = Notices()
    """Of any rank."""


def _sum_over_samples(
    *values: float | torch.Tensor, groups: ProcessGroups, device: torch.device
) -> list[float]:
    """Sums over data-parallel ranks, told to every rank."""
    total = _stacked(values, device)
    if not groups.has_loss:
        total.zero_()  # its samples are another rank's too, which speaks for them
    _sum_over_world(total)
    return total.tolist()


def _stacked(values: Iterable[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def _sum_over_world(total: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        # all-reduce over the world: each rank's sums -> sums of the global batch
        dist.all_reduce(total)


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[MicroBatch],
    *,
    groups: ProcessGroups,
    lr: float,
    num_tokens: int | None = None,
    message: Callable[[], Message] = Message,
) -> StepResult:
    """Forward, backward and update over the step's micro-batches.

    A global batch in which no token counts has no gradient: only the optimizer's moments move.

    Args:
        engine: From `build_engine`.
        batches: The micro-batches of this rank's data-parallel index.
        groups: Of the layout.
        lr: Learning rate of this step.
        num_tokens: Valid tokens of the global batch, where the step before has told; else the ranks
            count them first.
        message: Called after the update; goes with the loss in one sum.

    Returns:
        Loss, tokens and gradient norm of the global batch, and the messages of all ranks.
    """
    if num_tokens is None:
        own = sum(batch.num_tokens for batch in batches)
        num_tokens = round(_sum_over_samples(own, groups=groups, device=engine.device)[0])
    # DeepSpeed divides by the accumulation steps and averages over dp; we want sum / count.
    scale = len(batches) * groups.topology.data_parallel_size / max(num_tokens, 1)
    set_learning_rate(engine, lr)
    expect_gradient(engine, scale / len(batches))
    if groups.topology.pipeline_parallel_size > 1:
        engine.module.loss_sum.zero_()
        engine.train_batch(_pipeline_data(batches, scale))
        loss_sum = engine.module.loss_sum
    else:
        loss_sum = _accumulate(engine, batches, scale)
    next_tokens, notices = message()
    num_pairs = sum(batch.num_pairs for batch in batches)
    own_sums = (loss_sum, next_tokens, num_pairs) if groups.has_loss else (0.0, 0, 0)
    total = _stacked([*own_sums, *notices], engine.device)
    _sum_over_world(total)
    norm = _stacked([engine.get_global_grad_norm()], engine.device)
    # Where the host waits for the device.
    loss, tokens, pairs, *counts, grad_norm = torch.cat([total, norm]).tolist()
    return StepResult(
        loss=loss / max(num_tokens, 1),
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        num_pairs=round(pairs),
        next_tokens=round(tokens),
        notices=Notices(*(count > 0 for count in counts)),
    )


def _accumulate(
    engine: deepspeed.DeepSpeedEngine, batches: list[MicroBatch], scale: float
) -> torch.Tensor:
    """Forward and backward of each micro-batch and the update; returns the summed loss."""
    engine.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in batches:
        loss = _loss(engine, batch).sum()
        loss_sum += loss.detach()
        engine.backward(loss * scale)
        engine.step()  # updates at the last one
    return loss_sum


def _loss(engine: deepspeed.DeepSpeedEngine, batch: MicroBatch) -> torch.Tensor:
    return engine(*(None if t is None else t.to(engine.device, non_blocking=True) for t in batch))


def _pipeline_data(
    batches: Iterable[MicroBatch], scale: float
) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """What the first and the last stage read: inputs, and the scale of the summed loss."""
    for batch in batches:
        yield batch.pipeline_inputs(), torch.tensor(scale)


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine,
    batches: Iterable[MicroBatch],
    *,
    groups: ProcessGroups,
    is_told: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> float | None:
    """Mean loss over all valid tokens, in nats: a ratio of sums, never a mean of means.

    NaN where no token counts; None where a rank was told to stop before it was done.

    Args:
        engine: From `build_engine`; left in evaluation mode.
        batches: Those of this rank's data-parallel index; every rank must have the same number.
        groups: Of the layout.
        is_told: Whether this process was told to stop; asked every few micro-batches.
        progress: Counts the micro-batches.
    """
    engine.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    num_tokens = 0
    has_pipeline = groups.topology.pipeline_parallel_size > 1
    remaining = iter(batches)
    while chunk := list(islice(remaining, _PIPELINE_CHUNK if has_pipeline else _CHUNK)):
        told = _stacked((is_told(),), engine.device)
        _sum_over_world(told)  # all go on, or none
        if told.item():
            return None
        num_tokens += sum(batch.num_tokens for batch in chunk)
        if has_pipeline:
            engine.module.loss_sum.zero_()
            engine.eval_batch(
                _pipeline_data(chunk, 1.0),
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(chunk),
            )
            loss_sum += engine.module.loss_sum
        else:
            for batch in chunk:
                loss_sum += _loss(engine, batch).sum()
        if progress is not None:
            progress.add(len(chunk))
    total, count = _sum_over_samples(loss_sum, num_tokens, groups=groups, device=engine.device)
    return total / count if count else math.nan
