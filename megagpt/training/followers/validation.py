"""The loss of each validation set, at every eval_interval-th step and at the end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from megagpt.monitor.metrics import MetricLogger
from megagpt.monitor.progress import Progress
from megagpt.training.followers.record import StepRecord
from megagpt.training.start import Session
from megagpt.training.train_step import evaluate

logger = logging.getLogger("megagpt")


@dataclass(frozen=True)
class Validation:
    """Evaluates valid and each valid-NAME when they are due; a collective then."""

    session: Session
    metrics: MetricLogger
    eval_interval: int
    is_told: Callable[[], bool]
    """Whether this process was told to stop, which ends a validation without its loss."""

    def after_step(self, record: StepRecord) -> StepRecord | None:
        """Adds the losses to the record, if it is time."""
        # Told to stop, there may be little time: save, and evaluate another day.
        verdict = record.verdict
        if verdict.is_signalled or verdict.is_diverged or not record.is_due(self.eval_interval):
            return None
        session, losses = self.session, {}
        for split in session.batches.datasets:
            if split.startswith("valid"):
                loss = evaluate(
                    session.engine,
                    session.batches.evaluation(split),
                    groups=session.groups,
                    is_told=self.is_told,
                    progress=Progress(
                        f"validating on {split}",
                        session.batches.num_evaluation_batches(split),
                        logger.info,
                    ),
                )
                if loss is None:
                    logger.info(f"validation of {split} left off: a signal to stop was received")
                    break
                losses[split] = loss
                self.metrics.validation(
                    record.state.step,
                    record.state.consumed_samples,
                    loss,
                    name=split.removeprefix("valid"),
                )
        return dataclasses.replace(record, validation=losses)
