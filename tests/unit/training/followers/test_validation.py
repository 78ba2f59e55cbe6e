"""When a run is validated, and what the record and the log are given."""

from types import SimpleNamespace

import pytest
from steps import record

from megagpt.training.followers import validation
from megagpt.training.followers.record import Verdict
from megagpt.training.followers.validation import Validation

LOSSES = {"valid": 1.5, "valid-other": 2.5}


def evaluate(engine, batches, *, groups, is_told, progress):
    progress.add(1)
    return None if is_told() else LOSSES[batches]


@pytest.fixture
def logged(monkeypatch):
    monkeypatch.setattr(validation, "evaluate", evaluate)
    return []


def follower(logged, interval, is_told=lambda: False):
    def log(step, samples, loss, *, name):
        logged.append((step, samples, loss, name))

    batches = SimpleNamespace(
        datasets=dict.fromkeys(("train", *LOSSES, "test")),
        evaluation=lambda split: split,
        num_evaluation_batches=lambda split: 1,
    )
    session = SimpleNamespace(engine=None, groups=None, batches=batches)
    return Validation(session, SimpleNamespace(validation=log), interval, is_told)


def test_each_set_is_scored_at_each_interval_and_at_the_end(logged):
    follow = follower(logged, 2).after_step
    assert follow(record(1)) is None
    assert follow(record(2)).validation == LOSSES
    assert logged == [(2, 8, 1.5, ""), (2, 8, 2.5, "-other")]
    assert follow(record(5, verdict=Verdict(stop="train_steps=5 reached"))).validation == LOSSES


def test_a_validation_that_is_told_to_stop_logs_no_loss(logged):
    told = iter([False, True])
    follow = follower(logged, 2, lambda: next(told)).after_step
    assert follow(record(2)).validation == {"valid": 1.5}
    assert logged == [(2, 8, 1.5, "")]


def test_a_run_that_is_told_to_stop_is_not_validated(logged):
    told = Verdict(stop="a signal to stop was received", is_signalled=True)
    assert follower(logged, 2).after_step(record(2, verdict=told)) is None
    assert logged == []
