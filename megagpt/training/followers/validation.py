"""The loss of each validation set, at every eval_interval-th step and at the end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deepspeed import DeepSpeedEngine

from megagpt.monitor.metrics import MetricLogger
from megagpt.parallel.groups import ProcessGroups
from megagpt.training.batches import Batches
from megagpt.training.followers.record import StepRecord
from megagpt.training.train_step import evaluate


@dataclass(frozen=True)
class Validation:
    """Evaluates valid and each valid-NAME when they are due; a collective then."""

    metrics: MetricLogger
    eval_interval: int
    engine: DeepSpeedEngine
    batches: Batches
    groups: ProcessGroups

    def after_step(self, record: StepRecord) -> StepRecord | None:
        """Adds the losses to the record, if it is time."""
        # Told to stop, there may be little time: save, and evaluate another day.
        if record.verdict.is_signalled or not record.is_due(self.eval_interval):
            return None
        losses = {}
        for split in self.batches.datasets:
            if split.startswith("valid"):
                batches = self.batches.evaluation(split)
                losses[split] = evaluate(self.engine, batches, groups=self.groups)
                self.metrics.validation(
                    record.state.step,
                    record.state.consumed_samples,
                    losses[split],
                    name=split.removeprefix("valid"),
                )
        return dataclasses.replace(record, validation=losses)
