"""The summary counts all steps of the process and is written by rank 0 at the end of the run."""

import json
import time

import pytest
from steps import record

from megagpt.training.followers.record import Verdict
from megagpt.training.followers.summary import Summary

END = Verdict(stop="train_steps=2 reached")


def summary(directory, rank=0):
    return Summary(directory, rank, 1000, time.monotonic())


def test_it_is_written_at_the_end_with_the_figures_of_all_steps(tmp_path):
    follow = summary(tmp_path).after_step
    follow(record(1))
    assert list(tmp_path.iterdir()) == []
    losses = {"valid": 1.5, "valid-other": 2.5}
    follow(record(2, loss=3.0, seconds=3.0, verdict=END, validation=losses))
    written = json.loads((tmp_path / "training_summary.json").read_text())
    assert written.pop("megagpt_version") and written.pop("seconds") >= 0
    assert written == {
        "num_parameters": 1000,
        "step": 2,
        "tokens": 20,
        "tokens_per_second": 4.0,
        "train_loss": 3.0,
        "validation_loss": 1.5,
        "validation_loss-other": 2.5,
    }


@pytest.mark.parametrize(
    ("rank", "verdict"), [(1, END), (0, Verdict(stop="a signal", is_signalled=True))]
)
def test_neither_another_rank_nor_a_run_that_is_told_to_stop_writes_it(tmp_path, rank, verdict):
    summary(tmp_path, rank).after_step(record(2, verdict=verdict))
    assert list(tmp_path.iterdir()) == []
