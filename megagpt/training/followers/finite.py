"""Counts the steps in a row whose loss or gradient norm is not finite."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from deepspeed import DeepSpeedEngine

from megagpt.training.engine import is_at_least_loss_scale
from megagpt.training.followers.record import StepRecord


@dataclass
class Finite:
    """Adds the count to the record; the same on every rank, for the figures are."""

    engine: DeepSpeedEngine
    num_steps: int = 0
    """In a row, up to now; those of this process."""

    def after_step(self, record: StepRecord) -> StepRecord | None:
        """Counts a step; under fp16 one whose loss scale can still be lowered is no fault."""
        result = record.result
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        is_fault = not is_finite and is_at_least_loss_scale(self.engine)
        self.num_steps = self.num_steps + 1 if is_fault else 0
        return dataclasses.replace(record, num_nonfinite=self.num_steps) if is_fault else None
