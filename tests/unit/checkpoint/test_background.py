"""Work behind the training: it is waited for, and its error is told once, where one waits."""

import threading

import pytest

from megagpt.checkpoint.background import Background


def test_work_runs_beside_and_is_waited_for():
    background, go, done = Background(), threading.Event(), []
    background.wait()  # for nothing
    for number in range(2):
        go.clear()
        background.start(lambda n=number: (go.wait(), done.append(n)))
        assert not background.ends_within(0.01) and len(done) == number
        go.set()
        background.wait()
        assert done[-1] == number and background.ends_within(0)


def test_an_error_is_told_once_on_the_thread_that_waits():
    def fail():
        raise OSError("no space")

    background = Background()
    background.start(fail)
    assert background.ends_within(10) and background.has_failed
    with pytest.raises(OSError, match="no space"):
        background.wait()
    assert not background.has_failed
    background.wait()
    background.start(lambda: None)
    background.wait()
