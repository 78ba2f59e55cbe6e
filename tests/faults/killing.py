"""Rows of ranks that are killed while a step is saved, at any place of the save.

Next file: `storage.py`.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench import (
    AUTO,
    BASE_STEPS,
    EVERY_STEP,
    KEEP_TWO,
    Bench,
    Findings,
    Launch,
    check_intact,
    clutter,
    latest_step,
    newest_step,
    step_folder,
)
from ranks import Fault

from megagpt.checkpoint.format.manifest import optimizer_file, weights_file

_CHANGES = "?mkdir,mkdirat,openat,write,fsync,?rename,renameat,?renameat2,?unlink,unlinkat,?rmdir"
"""Syscalls that change a folder of checkpoints; those marked ? exist on some machines only."""
_CALL = re.compile(
    r"\d+ +(\w+)\((?:AT_FDCWD<[^>]*>, )?(?:\"(?P<name>[^\"]*)\"|\d+<(?P<file>[^>]*)>)"
)
_RACE_SECONDS = 3
"""What a rank is waited for; the others need a hundredth of it."""


@dataclass(frozen=True)
class Stage:
    """A place in a save, just before a syscall that changes the folder."""

    syscall: str
    path: str
    """In the folder of checkpoints; {new}, {old} and {pid} stand for what differs in each run."""
    when: int
    """Of the same calls on the path, which one."""
    count: int
    """How many there are."""

    def __str__(self) -> str:
        number = f" {self.when} of {self.count}" * (self.count > 1)
        return f"{self.syscall}{number} {self.path or 'the folder above'}"

    def fault(self, rank: int, run: Path, step: int) -> Fault:
        """A kill of the rank at this place of the save of a step."""
        path = self.path.replace("{new}", f"{step:08d}").replace("{old}", f"{step - 2:08d}")
        return Fault(
            rank,
            self.syscall,
            ((run / "checkpoints" / path),),
            f"signal=KILL:when={self.when}",
        )


def save_stages(trace: list[str], run: Path, step: int) -> list[Stage]:
    """The stages of the one save of a process, from what strace saw of it.

    Of the many writes to a shard the first two, a middle one and the last count.
    """
    folder = f"{run}/checkpoints"
    calls: list[tuple[str, str]] = []
    for line in trace:
        match = _CALL.match(line)
        if match is None or " = -1 " in line or match[1] == "openat" and "O_CREAT" not in line:
            continue
        path = match["name"] or match["file"] or ""
        if not path.startswith(folder):
            continue
        path = path.removeprefix(folder).removeprefix("/")
        path = path.replace(f"step_{step:08d}", "step_{new}")
        path = path.replace(f"step_{step - 2:08d}", "step_{old}")
        calls.append((match[1], re.sub(r"\.tmp\d+$", ".tmp{pid}", path)))
    counts = {call: calls.count(call) for call in calls}
    seen: dict[tuple[str, str], int] = {}
    stages = []
    for call in calls:
        seen[call] = number = seen.get(call, 0) + 1
        count = counts[call]
        if call[0] != "write" or number in (1, 2, count // 2, count):
            stages.append(Stage(*call, number, count))
    return stages


def kill_at_every_stage(bench: Bench, findings: Findings) -> str:
    """Rank 0 and the last rank, one after the other; each run resumes what the last kill left."""
    every = (*AUTO, *EVERY_STEP, *KEEP_TWO, "--training.exit_step")
    # One save more, after which each removes one step.
    run, step = bench.copy("killed"), BASE_STEPS + 1
    bench.train(run, *every, str(step))
    seconds, counts, lost = 0.0, [], []
    for rank in (0, 1):
        with bench.ranks(run, *every, str(step + 1), faults=[Fault(rank, _CHANGES)]) as ranks:
            findings.check(ranks.wait() == [0, 0], f"recording rank {rank}: {ranks.output(0)}")
            stages = save_stages(ranks.trace(rank), run, step + 1)
        step += 1
        counts.append(len(stages))
        # The folder is taken before a resume.
        begin_of_save = next(n for n, stage in enumerate(stages) if "{new}" in stage.path)
        for number, stage in enumerate(stages):
            name = f"rank {rank} before {stage}"
            findings.tried.append(name)
            fault = stage.fault(rank, run, step + 1)
            begin = time.monotonic()
            with bench.ranks(run, *every, str(step + 1), faults=[fault]) as ranks:
                codes = ranks.wait()
                seen = [line for line in ranks.trace(rank) if f" {stage.syscall}(" in line]
            seconds += time.monotonic() - begin
            # The kill was the injected one, at this call and no other.
            findings.check(len(seen) == stage.when, f"{name}: reached {len(seen)} of such calls")
            findings.check(codes[rank] == -signal.SIGKILL, f"{name}: not killed, {codes}")
            resumed = f"at step {step}" in ranks.output(0)
            findings.check(resumed or number < begin_of_save, f"{name}: did not resume")
            step, trained = check_intact(findings, run, bench.reference, name), step + 1
            lost.append(trained - step)
            if codes[rank] != -signal.SIGKILL and len(findings.problems) > 20:
                return "given up"
    findings.check(counts[0] >= 16 and counts[1] >= 10, f"{counts} stages only")
    findings.check(max(lost, default=0) <= 1, f"{lost} steps lost")
    bench.train(run, *every, str(step + 1))
    findings.check(newest_step(run) == step + 1, "the last run did not go on")
    check_intact(findings, run, bench.reference, "the last run")
    findings.check(not clutter(run), f"left behind: {clutter(run)}")
    return (
        f"{counts[0]} stages of rank 0, {counts[1]} of the last rank, all resumed on their own; "
        f"steps lost: at most {max(lost, default=0)} of an interval of 1; state bit-equal after "
        f"each; {seconds / max(1, len(lost)):.1f} s a kill"
    )


def kill_under_the_launcher(bench: Bench, findings: Findings) -> str:
    """The same through torchrun, at a stage of each rank."""
    assert bench.reference
    words = ("--checkpoint.save_interval", "20", "--training.exit_step", "60")
    for name, rank, syscall, path in (
        ("last rank before fsync of its moments", 1, "fsync", optimizer_file(1)),
        ("rank 0 before the rename of the folder", 0, "rename", ""),
    ):
        run = bench.root / f"launched_{syscall}"
        log = bench.root / f"{run.name}.log"
        target = step_folder(run, 40, staging=True) / path
        fault = Fault(rank, syscall, (target,), "signal=KILL:when=1")
        with Launch(bench.arguments(run, *words), log) as launch:
            launch.until("parameters: ")
            launch.inject(fault)
            code = launch.wait()
        findings.check(code != 0, f"{name}: the launcher ended with {code}")
        step = check_intact(findings, run, bench.reference, name)
        findings.check(step == 20, f"{name}: resumes at {step}, not at 20")
        with Launch(bench.arguments(run, *words, *AUTO), log) as launch:
            code = launch.wait()
        findings.check(code == 0, f"{name}: the second launch ended with {code}")
        findings.check(
            check_intact(findings, run, bench.reference, name) == 60, f"{name}: not trained to 60"
        )
        findings.check(not clutter(run), f"{name}: left behind {clutter(run)}")
    return "resumed at the save before, final weights and moments bit-equal to the run without"


def publish_race(bench: Bench, findings: Findings) -> str:
    """One rank is slow to write; the others have written all of theirs; then it is killed."""
    run = bench.copy("race")
    staging = step_folder(run, 4, staging=True)
    slow = Fault(1, "fsync", (staging / weights_file(1),), "delay_enter=60000000:when=1")
    words = (*AUTO, *EVERY_STEP, "--training.exit_step", "4")
    with bench.ranks(run, *words, faults=[slow]) as ranks:
        ranks.until("saving checkpoint at iteration       4")
        time.sleep(_RACE_SECONDS)
        findings.check((staging / optimizer_file(0)).exists(), "rank 0 had not written")
        findings.check(not step_folder(run, 4).exists(), "published without the last rank")
        findings.check(latest_step(run) == "step_00000003", "latest names it")
        ranks.signal(1, signal.SIGKILL)
        codes = ranks.wait()
    findings.check(codes[1] == -signal.SIGKILL and codes[0] != 0, f"exit codes {codes}")
    findings.check(not step_folder(run, 4).exists(), "published after the death of a rank")
    findings.check(latest_step(run) == "step_00000003", "latest names it")
    check_intact(findings, run, bench.reference, "after the race")
    bench.train(run, *words)
    findings.check(check_intact(findings, run, bench.reference, "resumed") == 4, "not resumed")
    return f"not published in {_RACE_SECONDS} s of waiting nor after the kill, then resumed"
