"""Ends the start of a run: from its first step on a rank that does not come is a fault sooner."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from megagpt.checkpoint.agreement import Agreement
from megagpt.parallel.groups import limit_waiting
from megagpt.training.followers.record import StepRecord


@dataclass
class Startup:
    """Building, compiling and loading take each host another time; a step does not."""

    agreement: Agreement
    """Keeps its own timeout: it waits for storage."""
    timeout_minutes: float
    is_over: bool = False

    def after_step(self, record: StepRecord) -> None:
        """Sets the timeout of training after the first step."""
        if not self.is_over:
            timeout = timedelta(minutes=self.timeout_minutes)
            limit_waiting(timeout, exempt=self.agreement.group)
            self.is_over = True
