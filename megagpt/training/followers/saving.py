"""Checkpoints at every save_interval-th step and at the end, and what a save that fails means."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megagpt.checkpoint.saver import Checkpointer, SaveFailed
from megagpt.config.schema import CheckpointConfig
from megagpt.training.followers.record import StepRecord

logger = logging.getLogger("megagpt")


@dataclass(frozen=True)
class Saving:
    """Saves the state of the run when it is due; a collective then.

    Raises:
        SaveFailed: On every rank, by either method, where a failed save ends the run.
    """

    checkpointer: Checkpointer
    config: CheckpointConfig
    weights_norm: Callable[[], float]
    """Euclidean norm of all weights; a collective."""

    def meet_failure(self, record: StepRecord) -> None:
        """Ends a save in the background that has failed, as soon as all ranks know of it."""
        if record.verdict.has_save_failed:
            with self._failure_met():
                self.checkpointer.finish()

    def after_step(self, record: StepRecord) -> StepRecord | None:
        """Saves if it is time; at the end it waits until the state is on disk.

        A state that is lost is never saved: retention would let go a good one for it. At the end
        the record says so.
        """
        if not record.is_due(self.config.save_interval):
            return None
        step, is_last = record.state.step, record.verdict.stop is not None
        with self._failure_met():
            self.checkpointer.finish()  # the one before, in the background
        problem = self._problem(record)
        if problem:
            logger.info(f"warning: no checkpoint at iteration {step}: {problem}")
            verdict = dataclasses.replace(record.verdict, is_diverged=is_last)
            return dataclasses.replace(record, verdict=verdict)
        directory = self.checkpointer.checkpoints
        logger.info(f"saving checkpoint at iteration {step:7d} to {directory}")
        with self._failure_met(is_last=is_last):
            self.checkpointer.save(record.state)
            if is_last:
                self.checkpointer.finish()
            if is_last or not self.config.async_save:
                logger.info(f"  successfully saved checkpoint at iteration {step:7d}")
        return None

    def _problem(self, record: StepRecord) -> str:
        """Why the state is not worth keeping; empty if it is. A collective."""
        is_lost = record.verdict.is_diverged or record.verdict.stop is None
        if record.num_nonfinite and is_lost:
            return "its loss or gradient norm is not finite"
        # An update can spoil the weights after the figures of its step were sound.
        if not math.isfinite(self.weights_norm()):
            return "not all of its weights are finite"
        return ""

    @contextmanager
    def _failure_met(self, *, is_last: bool = False) -> Iterator[None]:
        """Where a failed save does not end the run, it is told of, and training goes on."""
        try:
            yield
        except SaveFailed as error:
            if is_last or error.is_final or self.config.on_save_error == "stop":
                raise
            logger.info(f"warning: {error}; training goes on (checkpoint.on_save_error=continue)")
