"""What one step gave, as it is handed from follower to follower, and what a follower is.

Next files: the followers, each of which knows this one and none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.training.train_step import StepResult


@dataclass(frozen=True)
class Verdict:
    """How to go on after a step; the same on every rank."""

    stop: str | None = None
    """Why the run ends here; None if it goes on."""
    is_signalled: bool = False
    """Whether it ends because a rank was told to."""
    has_save_failed: bool = False
    """Whether a save in the background has failed on some rank."""
    is_diverged: bool = False
    """Whether it ends lost: too many steps in a row, or the weights, were not finite."""


@dataclass(frozen=True)
class StepRecord:
    """One step, and what the followers so far have added to it."""

    state: CheckpointState
    """After the step; its learning rate is that of the step."""
    result: StepResult
    """Loss, tokens and gradient norm."""
    seconds: float
    """That the step took."""
    data_wait_seconds: float
    """That it waited for its data, within `seconds`."""
    was_applied: bool
    """Whether the weights were updated; an overflow in fp16 skips that."""
    num_nonfinite: int = 0
    """Steps in a row, up to this one, that were not finite; from `finite.py`."""
    verdict: Verdict = Verdict()
    """From `stopping.py`."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Loss of each validation set, if this step was followed by a validation."""

    def is_due(self, interval: int) -> bool:
        """Whether to act after this step: at each interval (0 is never), and at the end."""
        return self.verdict.stop is not None or (interval > 0 and self.state.step % interval == 0)


Follower: TypeAlias = Callable[[StepRecord], StepRecord | None]
"""Called after each step, on every rank; returns the record with what it adds, None for nothing."""
