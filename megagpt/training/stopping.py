"""When a run ends: after so many steps or tokens, or after a time."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megagpt.checkpoint.state import CheckpointState
from megagpt.config.schema import TrainingConfig


def is_finished(training: TrainingConfig, state: CheckpointState) -> bool:
    """Whether nothing is left to train, whatever the time."""
    return _limit_reached(training, state) is not None


def stop_reason(
    training: TrainingConfig, state: CheckpointState, *, start_time: float
) -> str | None:
    """Why to stop after this step; the same answer on every rank, of which all must ask.

    Args:
        training: The limits.
        state: After the step.
        start_time: `time.monotonic()` at the start of this process's run.
    """
    if limit := _limit_reached(training, state):
        return limit
    if training.exit_duration_seconds is not None:
        # Clocks differ: rank 0 decides for all.
        late = torch.tensor([time.monotonic() - start_time > training.exit_duration_seconds])
        late = late.to(torch.int32)
        if dist.get_backend() != "gloo":
            late = late.cuda()
        dist.broadcast(late, src=0)
        if late.item():
            return f"exit_duration_seconds={training.exit_duration_seconds} reached"
    return None


def _limit_reached(training: TrainingConfig, state: CheckpointState) -> str | None:
    if state.step >= training.train_steps:
        return f"train_steps={training.train_steps} reached"
    if training.train_tokens is not None and state.consumed_tokens >= training.train_tokens:
        return f"train_tokens={training.train_tokens} reached"
    if training.exit_step and state.step >= training.exit_step:
        return f"exit_step={training.exit_step} reached"
    return None
