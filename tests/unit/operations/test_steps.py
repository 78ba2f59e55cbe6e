"""Steps: run once, checked afterwards, and ended with all of their processes."""

import os
import subprocess
import sys
import time

import pytest

from megagpt.operations.steps import Steps, end_session


def test_a_step_runs_until_its_output_is_whole(tmp_path, capfd):
    steps = Steps({"WORD": "there"}, start_time=time.time() - 100)
    file = tmp_path / "file"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['WORD'])"
    for _ in range(2):
        steps.step("make the file", file.exists, [sys.executable, "-c", code, file])
    assert file.read_text() == "there" and steps.num_run == 1
    assert steps.seconds >= 100
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "[  100 s] make the file" and lines[1].startswith("$ python")
    assert "make the file: done in " in lines[2] and "make the file: already done" in lines[3]


def test_what_fails_or_leaves_nothing_is_one_error(tmp_path):
    steps = Steps({}, start_time=time.time())
    with pytest.raises(ValueError, match=r"`python.* exited with 3; its message is above"):
        steps.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ValueError, match="'make nothing' left no whole output"):
        steps.step("make nothing", lambda: False, [sys.executable, "-c", ""])


def test_what_a_command_prints_is_kept(tmp_path, capfd):
    steps = Steps({}, start_time=time.time())
    steps.run([sys.executable, "-c", "print('a\\nb')"], output=tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "a\nb\n"
    assert capfd.readouterr().out.endswith("a\nb\n")


def test_the_end_of_a_session_is_that_of_all_its_processes():
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    end_session(leader)
    assert leader.poll() is not None
    deadline = time.monotonic() + 10
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
