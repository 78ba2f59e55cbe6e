"""When a run ends: after so many steps or tokens or a time, when it is told to, or is lost.

All ranks learn of it by the sums that end each step, for clocks and signals differ.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.checkpoint.saver import Checkpointer
from megagpt.config.schema import TrainingConfig
from megagpt.training.followers.record import StepRecord, Verdict
from megagpt.training.train_step import Notices

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


def is_finished(training: TrainingConfig, state: CheckpointState) -> bool:
    """Whether nothing is left to train, whatever the time."""
    return _limit_reached(training, state) is not None


@dataclass(frozen=True)
class Stopping:
    """Gives the verdict in which all ranks agree, by what each tells with its sums of a step."""

    training: TrainingConfig
    start_time: float
    """`time.monotonic()` at the start of this process's run; rank 0's counts."""
    stop_signal: StopSignal
    checkpointer: Checkpointer

    def notices(self) -> Notices:
        """What this rank has to tell the others."""
        limit = self.training.exit_duration_seconds
        elapsed = time.monotonic() - self.start_time
        return Notices(
            is_late=limit is not None and dist.get_rank() == 0 and elapsed > limit,
            is_told=self.stop_signal.received is not None,
            has_save_failed=self.checkpointer.has_failed,
        )

    def after_step(self, record: StepRecord) -> StepRecord:
        """Adds the verdict to the record."""
        late, is_told, has_save_failed = record.result.notices
        stop = _limit_reached(self.training, record.state)
        most, in_a_row = self.training.max_nonfinite_steps, record.num_nonfinite
        is_diverged = 0 < most <= in_a_row
        if is_diverged:
            stop = f"{in_a_row} steps in a row were not finite"
        if stop is None and late:
            stop = f"exit_duration_seconds={self.training.exit_duration_seconds} reached"
        is_signalled = stop is None and is_told
        if is_signalled:
            stop = "a signal to stop was received"
        verdict = Verdict(stop, is_signalled, has_save_failed, is_diverged)
        return dataclasses.replace(record, verdict=verdict)


def _limit_reached(training: TrainingConfig, state: CheckpointState) -> str | None:
    if state.step >= training.train_steps:
        return f"train_steps={training.train_steps} reached"
    if training.train_tokens is not None and state.consumed_tokens >= training.train_tokens:
        return f"train_tokens={training.train_tokens} reached"
    if training.exit_step and state.step >= training.exit_step:
        return f"exit_step={training.exit_step} reached"
    return None
