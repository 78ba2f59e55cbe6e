"""When a run ends: after so many steps or tokens, after a time, or when it is told to.

All ranks learn of it in one message after each step, for clocks and signals differ.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.config.schema import TrainingConfig

_REPEAT_SECONDS = 5.0
"""Within this, a second signal is the first one's echo: a launcher hands on what it got itself."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM and launchers send before they kill."""


class StopSignal:
    """Remembers that this process was told to stop; told again seconds later, it ends at once.

    A context manager: outside of it signals do what they did before. Only the main thread may
    enter it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > _REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on after a step."""

    stop: str | None
    """Why the run ends here; None if it goes on."""
    is_signalled: bool
    """Whether it ends because a rank was told to."""
    has_save_failed: bool
    """Whether a save in the background has failed on some rank."""


def is_finished(training: TrainingConfig, state: CheckpointState) -> bool:
    """Whether nothing is left to train, whatever the time."""
    return _limit_reached(training, state) is not None


def agree(
    training: TrainingConfig,
    state: CheckpointState,
    *,
    start_time: float,
    signalled: bool,
    has_save_failed: bool,
) -> Verdict:
    """How to go on after this step; a collective, the same answer on every rank.

    Args:
        training: The limits.
        state: After the step.
        start_time: `time.monotonic()` at the start of this process's run; rank 0's counts.
        signalled: Whether this rank was told to stop.
        has_save_failed: Whether this rank knows of a failed save.
    """
    limit = training.exit_duration_seconds
    late = limit is not None and dist.get_rank() == 0 and time.monotonic() - start_time > limit
    flags = torch.tensor([late, signalled, has_save_failed], dtype=torch.int32)
    if dist.get_backend() != "gloo":
        flags = flags.cuda()
    # all-reduce over the world: each rank's flags -> whether any rank has set them
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    late, signalled, has_save_failed = (bool(flag) for flag in flags.tolist())
    stop = _limit_reached(training, state)
    if stop is None and late:
        stop = f"exit_duration_seconds={limit} reached"
    is_signalled = stop is None and signalled
    if is_signalled:
        stop = "a signal to stop was received"
    return Verdict(stop, is_signalled, has_save_failed)


def _limit_reached(training: TrainingConfig, state: CheckpointState) -> str | None:
    if state.step >= training.train_steps:
        return f"train_steps={training.train_steps} reached"
    if training.train_tokens is not None and state.consumed_tokens >= training.train_tokens:
        return f"train_tokens={training.train_tokens} reached"
    if training.exit_step and state.step >= training.exit_step:
        return f"exit_step={training.exit_step} reached"
    return None
