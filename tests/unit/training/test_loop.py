"""The loop hands each step to the followers in their order and ends by their verdict."""

import dataclasses
from types import SimpleNamespace

import pytest

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.config.schema import Config, ModelConfig
from megagpt.training import loop
from megagpt.training.followers.order import followers_of
from megagpt.training.followers.record import StepRecord, Verdict
from megagpt.training.followers.stopping import Stopping
from megagpt.training.train_step import Notices, StepResult


@pytest.fixture
def session(monkeypatch, tmp_path):
    """One whose steps are made up."""
    config = Config(model=ModelConfig(vocab_size=257))
    state = CheckpointState(0, 0, 0, config=config, data_fingerprint={})
    run = SimpleNamespace(config=config, directory=tmp_path, rank=0, start_time=0.0)
    parts = dict.fromkeys(("engine", "groups", "batches", "checkpointer"))
    session = SimpleNamespace(run=run, state=state, **parts)

    def advance(session, notices, *, num_tokens):
        assert num_tokens == (20 if session.state.step else None)
        assert notices() == Notices()
        session.state = dataclasses.replace(session.state, step=session.state.step + 1)
        return StepRecord(session.state, StepResult(2.0, 10, 0.5, next_tokens=20), 1.0, 0.0, True)

    monkeypatch.setattr(loop, "advance", advance)
    return session


def test_each_follower_sees_what_those_before_it_added(session):
    seen = []

    def figures(record):
        seen.append(("figures", record.state.step, record.verdict.stop))

    def stopping(record):
        stop = "enough" if record.state.step == 2 else None
        return dataclasses.replace(record, verdict=Verdict(stop))

    def validation(record):
        seen.append(("validation", record.state.step, record.verdict.stop))
        return dataclasses.replace(record, validation={"valid": 1.0})

    def saving(record):
        seen.append(("saving", record.state.step, record.verdict.stop, dict(record.validation)))

    last = loop.take_steps(session, (figures, stopping, validation, saving), notices=Notices)
    assert seen == [
        ("figures", 1, None),
        ("validation", 1, None),
        ("saving", 1, None, {"valid": 1.0}),
        ("figures", 2, None),
        ("validation", 2, "enough"),
        ("saving", 2, "enough", {"valid": 1.0}),
    ]
    assert (last.state.step, last.verdict.stop, last.validation) == (2, "enough", {"valid": 1.0})


def test_on_step_ends_the_run_before_anything_follows(session):
    followed, steps = [], []

    def on_step(result):
        steps.append((session.state.step, result.loss))
        return len(steps) == 3

    assert loop.take_steps(session, (followed.append,), on_step, notices=Notices) is None
    assert steps == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert [record.state.step for record in followed] == [1, 2]


def test_a_run_is_followed_in_this_order(session):
    session.checkpointer = SimpleNamespace(agreement=None)
    followers = followers_of(session, SimpleNamespace(), Stopping(*[None] * 4))
    assert [f"{type(f.__self__).__name__}.{f.__name__}" for f in followers] == [
        "Startup.after_step",
        "Finite.after_step",
        "Figures.after_step",
        "Stopping.after_step",
        "Saving.meet_failure",
        "Validation.after_step",
        "Summary.after_step",
        "Saving.after_step",
    ]
