"""Ranks that run the real command, forked from a process that has imported everything.

A launch takes ten seconds, nearly all of them imports; forked, the same script takes one. What runs
is `launch/pretrain.py` from its arguments to its exit code; strace injects faults into one rank.
Next file: `runs.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain.py"
GRACE_SECONDS = 15
"""How long the others may take to notice that a rank has died; then they are killed."""


@dataclass(frozen=True)
class Fault:
    """What strace does to one rank: a syscall on certain paths, and what is injected into it."""

    rank: int
    syscalls: str
    """As in strace's `-e trace=`; comma-separated."""
    paths: tuple[Path, ...] = ()
    """Only syscalls on these count, all if none is given; {pid} in one is that of the rank."""
    inject: str = ""
    """As in strace's `-e inject=SYSCALLS:`, such as `error=EIO:when=1`; empty only records."""

    def command(self, pid: int, log: Path) -> list[str]:
        """The strace that attaches to a running rank."""
        words = ["strace", "-f", "-q", "-y", "-s", "0", "-o", str(log), "-p", str(pid)]
        for path in self.paths:
            words += ["-P", str(path).format(pid=pid)]
        words += ["-e", f"trace={self.syscalls}"]
        return words + (["-e", f"inject={self.syscalls}:{self.inject}"] if self.inject else [])


class Ranks:
    """A running world; a context manager that leaves no process behind.

    Args:
        arguments: Of `launch/pretrain.py`; one list for all ranks, or one for each.
        folder: For what the ranks print.
        world_size: Processes.
        faults: At most one for each rank.
    """

    def __init__(
        self,
        arguments: Sequence[str] | list[list[str]],
        folder: Path,
        *,
        world_size: int = 2,
        faults: Sequence[Fault] = (),
    ) -> None:
        one_for_all = isinstance(arguments[0], str)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks_", dir=folder))
        self._faults = {fault.rank: fault for fault in faults}
        self._tracers: dict[int, subprocess.Popen] = {}
        self.processes = [
            _forkserver().Process(
                target=_rank_main,
                args=(
                    *(rank, world_size, arguments if one_for_all else arguments[rank]),
                    *(self.folder, rank in self._faults),
                ),
            )
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        try:
            for process in self.processes:
                process.start()
            for rank, fault in self._faults.items():
                pid = self.processes[rank].pid
                assert pid is not None
                command = fault.command(pid, self.trace_file(rank))
                self._tracers[rank] = subprocess.Popen(
                    command, stderr=subprocess.DEVNULL, start_new_session=True
                )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            if process.pid is not None:
                process.kill()
        for tracer in self._tracers.values():
            tracer.kill()  # it may hold a rank in a delay, even one that was killed
            tracer.wait()
        for process in self.processes:
            if process.pid is not None:
                process.join()

    def wait(self, timeout_seconds: float = 60) -> list[int]:
        """Waits for all; once one has failed, the others have a little time.

        Returns:
            Exit code of each rank, negative for a signal; -9 for one that had to be ended.

        Raises:
            TimeoutError: If they are still running then.
        """
        deadline = time.monotonic() + timeout_seconds
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                if not any(process.exitcode for process in self.processes):
                    raise TimeoutError(f"running after {timeout_seconds} s:\n{self.output(0)}")
                break
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        if number == signal.SIGKILL and rank in self._tracers:
            self._tracers[rank].kill()  # it may hold the rank in a delay

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        path = self.folder / f"rank{rank}.out"
        return path.read_text() if path.exists() else ""

    def errors(self) -> list[str]:
        """The `error:` lines of all ranks."""
        return [
            line
            for rank in range(len(self.processes))
            for line in self.output(rank).splitlines()
            if line.startswith("error:")
        ]

    def trace_file(self, rank: int) -> Path:
        """What strace wrote of a rank."""
        return self.folder / f"rank{rank}.trace"

    def trace(self, rank: int) -> list[str]:
        """The syscalls of a rank that strace saw; whole once the rank has ended."""
        self._tracers[rank].wait(timeout=10)
        return self.trace_file(rank).read_text().splitlines()

    def until(self, text: str, *, rank: int = 0, timeout_seconds: float = 60) -> None:
        """Waits until a rank has printed a text.

        Raises:
            TimeoutError: If it has not, or has ended without it.
        """
        deadline = time.monotonic() + timeout_seconds
        while text not in self.output(rank):
            if time.monotonic() > deadline or self.processes[rank].exitcode is not None:
                if text in self.output(rank):
                    return
                raise TimeoutError(f"rank {rank} did not print {text!r}:\n{self.output(rank)}")
            time.sleep(0.005)


@cache
def tracing_problem() -> str | None:
    """Why faults cannot be injected here; None if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "30"]) as victim:
        try:
            words = ["timeout", "5", "strace", "-q", "-p", str(victim.pid)]
            words += ["-e", "trace=none", "-e", "inject=kill:error=EIO"]
            with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
                time.sleep(0.3)
                attached = f"TracerPid:\t{tracer.pid}" in _status(victim.pid)
                attached = attached or "TracerPid:\t0" not in _status(victim.pid)
                tracer.terminate()
                assert tracer.stderr is not None
                problem = tracer.stderr.read().strip()
        finally:
            victim.kill()
    return None if attached else f"strace cannot attach to a process here: {problem}"


@cache
def _forkserver() -> multiprocessing.context.ForkServerContext:
    """The process that has imported what a run imports."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    # Another ninja than that of make compiles every op anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # It looks up what it imports beforehand in the path of its environment only.
    path = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    return context


def _status(pid: int | str) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _rank_main(
    rank: int, world_size: int, arguments: list[str], folder: Path, is_traced: bool
) -> None:
    """Becomes one rank of `launch/pretrain.py`."""
    output = os.open(folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    import torch

    torch.set_num_threads(1)
    # What a launcher does over a port is done over a file here, so that no port can clash.
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    if is_traced:
        _wait_for_tracer()
    sys.argv = [str(SCRIPT), *arguments]
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _wait_for_tracer() -> None:
    deadline = time.monotonic() + 20
    while "TracerPid:\t0" in _status("self"):
        if time.monotonic() > deadline:
            raise TimeoutError("no tracer came")
        time.sleep(0.01)
    time.sleep(0.1)  # it attaches to one thread after the other
