"""`training_summary.json`: the figures of the whole run, written at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megagpt import __version__
from megagpt.files import write_json
from megagpt.training.followers.record import StepRecord


@dataclass
class Summary:
    """Counts the steps of this process and writes the summary where the run ends by itself.

    It comes before the last checkpoint, which marks the end of the run.
    """

    run_directory: Path
    rank: int
    num_parameters: int
    start_time: float
    """`time.monotonic()` at the start of this process's run."""
    num_tokens: int = 0
    seconds: float = 0.0

    def after_step(self, record: StepRecord) -> None:
        """Counts every step; writes after the last one."""
        self.num_tokens += record.result.num_tokens
        self.seconds += record.seconds
        verdict, losses = record.verdict, record.validation
        if self.rank != 0 or not verdict.stop or verdict.is_signalled or verdict.is_diverged:
            return
        values = {
            "megagpt_version": __version__,
            "num_parameters": self.num_parameters,
            "step": record.state.step,
            "tokens": record.state.consumed_tokens,
            "tokens_per_second": self.num_tokens / self.seconds,
            "train_loss": record.result.loss,
            "validation_loss": losses.get("valid"),
            **{
                f"validation_loss-{split.removeprefix('valid-')}": loss
                for split, loss in losses.items()
                if split != "valid"
            },
            "seconds": time.monotonic() - self.start_time,
        }
        write_json(self.run_directory / "training_summary.json", values)
