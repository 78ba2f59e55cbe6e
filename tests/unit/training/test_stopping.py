"""Signals to stop: the first is remembered, its echo ignored, a later one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megagpt.training.stopping import StopSignal

SCRIPT = """
import signal, sys, time
from megagpt.training import stopping
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
