"""Limits and signals: the first signal is remembered, its echo ignored, a later one ends it."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from steps import record

from megagpt.config.schema import TrainingConfig
from megagpt.training.followers.record import Verdict
from megagpt.training.followers.stopping import Stopping, StopSignal, is_finished
from megagpt.training.train_step import StepResult

SCRIPT = """
import signal, sys, time
from megagpt.training.followers import stopping
stopping._REPEAT_SECONDS = float(sys.argv[1])
with stopping.StopSignal() as stop:
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
print(stop.received)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.received == number.name
        os.kill(os.getpid(), number)  # as a launcher sends it, which got one too
        time.sleep(0.01)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("repeat_seconds", "code", "printed"), [(60, 0, "SIGTERM\n"), (0.1, -signal.SIGTERM, "")]
)
def test_echo_is_ignored_and_a_later_signal_ends_it(repeat_seconds, code, printed):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repeat_seconds)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, printed), done.stderr


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


LIMITS = [
    # limits, seconds since the start, told to stop, has a save failed -> verdict after step 3
    ({}, 0, False, False, Verdict()),
    ({"train_steps": 3}, 0, False, False, Verdict("train_steps=3 reached")),
    ({"train_tokens": 30}, 0, False, False, Verdict("train_tokens=30 reached")),
    ({"train_tokens": 31}, 0, False, False, Verdict()),
    ({"exit_step": 3}, 0, False, True, Verdict("exit_step=3 reached", False, True)),
    ({"exit_duration_seconds": 60}, 50, False, False, Verdict()),
    (
        *({"exit_duration_seconds": 60}, 70, True, False),
        Verdict("exit_duration_seconds=60 reached"),  # it ends by itself, told or not
    ),
    ({}, 0, True, False, Verdict("a signal to stop was received", True)),
]


@pytest.mark.parametrize(("most", "is_diverged"), [(4, False), (3, True), (2, True), (0, False)])
def test_too_many_steps_that_are_not_finite_end_the_run(world_of_one, most, is_diverged):
    stopping = Stopping(
        TrainingConfig(max_nonfinite_steps=most),
        time.monotonic(),
        SimpleNamespace(received=None),
        SimpleNamespace(has_failed=False),
    )
    verdict = stopping.after_step(record(9, num_nonfinite=3)).verdict
    assert verdict.is_diverged == is_diverged
    assert verdict.stop == ("3 steps in a row were not finite" if is_diverged else None)


@pytest.mark.parametrize(("limits", "elapsed", "is_told", "has_failed", "verdict"), LIMITS)
def test_limits_and_signals_end_the_run(
    world_of_one, limits, elapsed, is_told, has_failed, verdict
):
    training = TrainingConfig(**limits)
    stopping = Stopping(
        training,
        time.monotonic() - elapsed,
        SimpleNamespace(received="SIGTERM" if is_told else None),
        SimpleNamespace(has_failed=has_failed),
    )
    result = StepResult(2.0, 10, 0.5, notices=stopping.notices())  # in a world of one
    followed = stopping.after_step(record(3, result=result))
    assert followed.verdict == verdict
    is_limit = verdict.stop is not None and not is_told
    assert is_finished(training, followed.state) == is_limit
