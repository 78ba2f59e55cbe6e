"""Checkpoints at every save_interval-th step and at the end, and what a save that fails means."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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

    def meet_failure(self, record: StepRecord) -> None:
        """Ends a save in the background that has failed, as soon as all ranks know of it."""
        if record.verdict.has_save_failed:
            with self._failure_met():
                self.checkpointer.finish()

    def after_step(self, record: StepRecord) -> None:
        """Saves if it is time; at the end it waits until the state is on disk."""
        if not record.is_due(self.config.save_interval):
            return
        step, is_last = record.state.step, record.verdict.stop is not None
        with self._failure_met():
            self.checkpointer.finish()  # the one before, in the background
        directory = self.checkpointer.checkpoints
        logger.info(f"saving checkpoint at iteration {step:7d} to {directory}")
        with self._failure_met(is_last=is_last):
            self.checkpointer.save(record.state)
            if is_last:
                self.checkpointer.finish()
            if is_last or not self.config.async_save:
                logger.info(f"  successfully saved checkpoint at iteration {step:7d}")

    @contextmanager
    def _failure_met(self, *, is_last: bool = False) -> Iterator[None]:
        """Where a failed save does not end the run, it is told of, and training goes on."""
        try:
            yield
        except SaveFailed as error:
            if is_last or error.is_final or self.config.on_save_error == "stop":
                raise
            logger.info(f"warning: {error}; training goes on (checkpoint.on_save_error=continue)")
