"""The loss of each validation set, at every eval_interval-th step and at the end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megagpt.monitor.metrics import MetricLogger
from megagpt.training.followers.record import StepRecord
from megagpt.training.start import Session
from megagpt.training.train_step import evaluate


@dataclass(frozen=True)
class Validation:
    """Evaluates valid and each valid-NAME when they are due; a collective then."""

    session: Session
    metrics: MetricLogger
    eval_interval: int

    def after_step(self, record: StepRecord) -> StepRecord | None:
        """Adds the losses to the record, if it is time."""
        # Told to stop, there may be little time: save, and evaluate another day.
        verdict = record.verdict
        if verdict.is_signalled or verdict.is_diverged or not record.is_due(self.eval_interval):
            return None
        session, losses = self.session, {}
        for split in session.batches.datasets:
            if split.startswith("valid"):
                batches = session.batches.evaluation(split)
                losses[split] = evaluate(session.engine, batches, groups=session.groups)
                self.metrics.validation(
                    record.state.step,
                    record.state.consumed_samples,
                    losses[split],
                    name=split.removeprefix("valid"),
                )
        return dataclasses.replace(record, validation=losses)
