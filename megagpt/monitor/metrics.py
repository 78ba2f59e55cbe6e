"""TensorBoard scalars under Megatron's tags and Megatron's line per iteration, from one rank.

Knows nothing of the model or DeepSpeed. Tags: Megatron-LM's `training_log`.
"""

from __future__ import annotations

import datetime
import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger("megagpt")


def perplexity(loss: float) -> float:
    """E to the power of nats per token; NaN for NaN, infinite where a float does not reach."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class MetricLogger:
    """Writes each step once; on every rank but 0 it does nothing."""

    def __init__(
        self, directory: Path, *, rank: int, train_steps: int, step: int, consumed_samples: int
    ) -> None:
        """Opens the TensorBoard folder on rank 0.

        Args:
            directory: TensorBoard log folder.
            rank: Global rank.
            train_steps: Steps of the whole run, for the line.
            step: Steps completed before; later points of an earlier run are hidden.
            consumed_samples: Samples completed before, likewise.
        """
        self.train_steps = train_steps
        self.writer: Any = None
        self.samples_writer: Any = None
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            # A purge hides every tag of its folder beyond a step, so curves over samples, whose
            # steps are samples, stand in a folder of their own.
            self.writer = SummaryWriter(str(directory), purge_step=step + 1)
            self.samples_writer = SummaryWriter(
                str(directory / "samples"), purge_step=consumed_samples + 1
            )

    def text(self, tag: str, text: str) -> None:
        """Writes a text, shown in a fixed-width font."""
        if self.writer is not None:
            self.writer.add_text(tag, "    " + text.replace("\n", "\n    "))

    def training(self, step: int, consumed_samples: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step and prints its line.

        Args:
            step: Steps completed.
            consumed_samples: Samples completed.
            values: By tag; needs `lm loss`, `learning-rate`, `grad-norm`, `batch-size`,
                `loss-scale`, `iteration-time` (seconds), `throughput` (TFLOP/s per rank),
                `tokens-per-second`, `skipped-iterations`, `nan-iterations`; `params-norm` where it
                was measured.
        """
        if self.writer is None:
            return
        for tag, value in values.items():
            self._scalar(tag, value, step, consumed_samples)
        norm = f" params norm: {values['params-norm']:.3f} |" if "params-norm" in values else ""
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
        eta = datetime.timedelta(
            seconds=round((self.train_steps - step) * values["iteration-time"])
        )
        logger.info(
            f" [{now}] iteration {step:8d}/{self.train_steps:8d} |"
            f" consumed samples: {consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {values['iteration-time'] * 1000:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {values['throughput']:.3f} |"
            f" tokens per second: {values['tokens-per-second']:.0f} |"
            f" learning rate: {values['learning-rate']:.6E} |"
            f" global batch size: {values['batch-size']:5.0f} |"
            f" lm loss: {values['lm loss']:.6E} |"
            f" loss scale: {values['loss-scale']:.1f} |"
            f" grad norm: {values['grad-norm']:.3f} |"
            f"{norm}"
            f" number of skipped iterations: {values['skipped-iterations']:3.0f} |"
            f" number of nan iterations: {values['nan-iterations']:3.0f} |"
            f" ETA: {eta} |"
        )

    def validation(self, step: int, consumed_samples: int, loss: float, *, name: str = "") -> None:
        """Writes a validation loss and its perplexity, and prints them between rules.

        Args:
            step: Steps completed.
            consumed_samples: Samples completed.
            loss: Nats per token.
            name: `-NAME` of one of several validation sets.
        """
        if self.writer is None:
            return
        self._scalar(f"lm loss validation{name}", loss, step, consumed_samples)
        self._scalar(f"lm loss validation{name} ppl", perplexity(loss), step, consumed_samples)
        line = (
            f" validation{name} loss at iteration {step} | lm loss value: {loss:.6E} |"
            f" lm loss PPL: {perplexity(loss):.6E} | "
        )
        for text in ("-" * len(line), line, "-" * len(line)):
            logger.info(text)
        self.writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self.writer is not None:
            self.writer.close()
            self.samples_writer.close()

    def _scalar(self, tag: str, value: float, step: int, consumed_samples: int) -> None:
        self.writer.add_scalar(tag, value, step)
        self.samples_writer.add_scalar(f"{tag} vs samples", value, consumed_samples)
