"""When a checkpoint is saved, and what a save that fails means for the run."""

import math
from types import SimpleNamespace

import pytest
from steps import record

from megagpt.checkpoint.saver import SaveFailed
from megagpt.config.schema import CheckpointConfig
from megagpt.training.followers.record import Verdict
from megagpt.training.followers.saving import Saving

END = Verdict(stop="train_steps=5 reached")


class FakeCheckpointer(SimpleNamespace):
    """Notes what is asked of it; fails where told to."""

    def __init__(self, **failures):
        super().__init__(checkpoints="run/checkpoints", failures=failures, calls=[])

    def _call(self, name):
        self.calls.append(name)
        if name in self.failures:
            raise self.failures.pop(name)

    def save(self, state):
        self._call(f"save {state.step}")

    def finish(self):
        self._call("finish")


def failure(*, is_final=False):
    return SaveFailed("no space", is_final=is_final)


def test_it_saves_at_each_interval_and_waits_at_the_end():
    checkpointer = FakeCheckpointer()
    saving = Saving(checkpointer, CheckpointConfig(save_interval=2), lambda: 1.0)
    for step in (1, 2, 3):
        saving.after_step(record(step))
    assert checkpointer.calls == ["finish", "save 2"]
    saving.after_step(record(5, verdict=END))
    assert checkpointer.calls[2:] == ["finish", "save 5", "finish"]


def test_an_interval_of_0_saves_only_at_the_end():
    checkpointer = FakeCheckpointer()
    saving = Saving(checkpointer, CheckpointConfig(save_interval=0), lambda: 1.0)
    saving.after_step(record(4))
    assert checkpointer.calls == []
    saving.after_step(record(5, verdict=END))
    assert "save 5" in checkpointer.calls


def test_a_failed_save_in_the_background_is_met_as_soon_as_all_know_of_it():
    checkpointer = FakeCheckpointer(finish=failure())
    saving = Saving(checkpointer, CheckpointConfig(), lambda: 1.0)
    saving.meet_failure(record())
    assert checkpointer.calls == []
    with pytest.raises(SaveFailed):
        saving.meet_failure(record(verdict=Verdict(has_save_failed=True)))


@pytest.mark.parametrize(
    ("policy", "step", "error", "ends"),
    [
        ("stop", 2, failure(), True),
        ("continue", 2, failure(), False),
        ("continue", 2, failure(is_final=True), True),
        ("continue", 5, failure(), True),  # the last one
    ],
)
def test_a_failed_save_ends_the_run_or_not(policy, step, error, ends):
    checkpointer = FakeCheckpointer(**{f"save {step}": error})
    saving = Saving(
        checkpointer, CheckpointConfig(save_interval=2, on_save_error=policy), lambda: 1.0
    )
    last = record(step, verdict=END if step == 5 else Verdict())
    if ends:
        with pytest.raises(SaveFailed):
            saving.after_step(last)
    else:
        saving.after_step(last)
        saving.after_step(record(4))
        assert checkpointer.calls[-1] == "save 4"


@pytest.mark.parametrize(
    ("last", "norm", "saves", "is_diverged"),
    [
        (record(2), 1.0, True, False),
        (record(2), math.nan, False, False),
        (record(2), math.inf, False, False),
        (record(2, num_nonfinite=1), 1.0, False, False),
        # Told to stop amid steps that were skipped: the weights are those of before.
        (record(2, num_nonfinite=1, verdict=Verdict("a signal", True)), 1.0, True, False),
        (record(2, num_nonfinite=1, verdict=Verdict("a signal", True)), math.nan, False, True),
        (record(2, num_nonfinite=9, verdict=Verdict("9", is_diverged=True)), 1.0, False, True),
    ],
)
def test_a_lost_state_is_not_saved(last, norm, saves, is_diverged):
    checkpointer = FakeCheckpointer()
    saving = Saving(checkpointer, CheckpointConfig(save_interval=2), lambda: norm)
    followed = saving.after_step(last) or last
    assert ("save 2" in checkpointer.calls) == saves
    assert followed.verdict.is_diverged == is_diverged
