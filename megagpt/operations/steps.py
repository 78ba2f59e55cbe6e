"""Commands run one after the other, each skipped when its output is there and whole.

Knows nothing of what they do. Imports the standard library only.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any


class Steps:
    """Runs the steps in order and keeps the time.

    Args:
        environment: Of the commands, beside that of this process.
        start_time: Seconds since the epoch at which the whole began.
    """

    def __init__(self, environment: Mapping[str, str], *, start_time: float) -> None:
        self.start_time = start_time
        self.num_run = 0
        self._environment = {**os.environ, **environment}

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.time() - self.start_time

    def step(self, title: str, done: Callable[[], bool], command: Sequence[str | Path]) -> None:
        """Runs a command unless its output is there, and checks that it is afterwards.

        Raises:
            ValueError: If the command fails, or leaves no whole output.
        """
        if done():
            self._say(f"{title}: already done")
            return
        self._say(title)
        self.num_run += 1
        begin = time.monotonic()
        self.run(command)
        if not done():
            raise ValueError(f"'{title}' left no whole output; see above, and start it again")
        self._say(f"{title}: done in {time.monotonic() - begin:.0f} s")

    def run(self, command: Sequence[str | Path], *, output: Path | None = None) -> None:
        """Runs one command; with output, what it prints is kept there, and shown at its end.

        Raises:
            ValueError: If it fails.
        """
        words = [str(word) for word in command]
        shown = shlex.join([Path(words[0]).name, *words[1:]])
        print(f"$ {shown}", flush=True)
        with nullcontext() if output is None else output.open("w") as file:
            with own_session(words, env=self._environment, stdout=file) as process:
                code = process.wait()
        if output is not None:
            print(output.read_text(), end="", flush=True)
        if code:
            raise ValueError(f"`{shown}` exited with {code}; its message is above")

    def _say(self, line: str) -> None:
        print(f"[{self.seconds:5.0f} s] {line}", flush=True)


@contextmanager
def own_session(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, all of which ends where the block does not.

    So an interrupt ends a launcher and its ranks alike; the launcher itself would leave them.

    Args:
        words: Program and arguments.
        **options: As for `subprocess.Popen`.
    """
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        yield process
    except BaseException:
        end_session(process)
        raise


def end_session(leader: subprocess.Popen) -> None:
    """Ends a process and all of its session: politely, and after ten seconds for certain."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                os.killpg(leader.pid, 0)
                leader.poll()  # reaps it
                time.sleep(0.1)
        except ProcessLookupError:  # all are gone
            return
