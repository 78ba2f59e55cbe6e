"""Tests of what a command does with an error: one line, an exit code, a traceback on request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("raise ValueError('a=1\\n  is wrong')", 1, "error: a=1 is wrong\n"),
        ("open('missing/file')", 1, "error: missing/file: No such file or directory\n"),
        ("raise UsageError('x')", 2, "error: x\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ],
)
def test_run_command_prints_one_line_and_returns_the_exit_code(
    body: str, code: int, stderr: str
) -> None:
    script = (
        "import sys\nfrom megagpt.config.command import UsageError, run_command\n"
        f"def main(argv):\n    {body}\nsys.exit(run_command(main))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_traceback_is_shown_on_request() -> None:
    script = (
        "import sys\nfrom megagpt.config.command import run_command\n"
        "def main(argv):\n    raise ValueError('x')\nsys.exit(run_command(main))"
    )
    environment = {**os.environ, "MEGAGPT_TRACEBACK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith("error: x\n")


def test_a_reader_that_has_enough_ends_the_command_in_silence() -> None:
    code = (
        "import sys\nfrom megagpt.config.command import run_command\n"
        "def main(argv):\n    print('line\\n' * 100_000)\nsys.exit(run_command(main))"
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")
