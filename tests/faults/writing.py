"""Rows of faults that meet a save: kills, full and failing disks, ranks that disagree, retention.

Next file: `reading.py`.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench import (
    AUTO,
    BASE_STEPS,
    EVERY_STEP,
    Bench,
    Findings,
    Launch,
    check_intact,
    clutter,
    latest_step,
    newest_step,
    remount,
    step_folder,
)
from ranks import Fault, Ranks

from megagpt.checkpoint.directory import complete_steps
from megagpt.checkpoint.format.manifest import optimizer_file, weights_file
from megagpt.checkpoint.owner import OWNER_FILE

_CHANGES = "?mkdir,mkdirat,openat,write,fsync,?rename,renameat,?renameat2,?unlink,unlinkat,?rmdir"
"""Syscalls that change a folder of checkpoints; those marked ? exist on some machines only."""
_CALL = re.compile(
    r"\d+ +(\w+)\((?:AT_FDCWD<[^>]*>, )?(?:\"(?P<name>[^\"]*)\"|\d+<(?P<file>[^>]*)>)"
)
_RACE_SECONDS = 3
"""What a rank is waited for; the others need a hundredth of it."""
_KEEP_TWO = ("--checkpoint.keep_last", "2")


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
    every = (*AUTO, *EVERY_STEP, *_KEEP_TWO, "--training.exit_step")
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


def full_disk(bench: Bench, findings: Findings) -> str:
    """Bytes run out in the middle of a save."""
    size = sum(f.stat().st_size for f in step_folder(bench.base, BASE_STEPS).iterdir())
    return _run_out(bench, findings, "bytes", f"size={size * 3 // 2 // 4096 * 4096}")


def full_inodes(bench: Bench, findings: Findings) -> str:
    """Inodes run out in the middle of a save."""
    # The root, a step of a folder and five files, latest, the owner; then a folder and two of four
    # shards.
    return _run_out(bench, findings, "inodes", "size=64m,nr_inodes=12")


def _run_out(bench: Bench, findings: Findings, what: str, options: str) -> str:
    run = bench.copy(f"full_{what}")
    with bench.small_disk(run, options) as checkpoints:
        words = (*AUTO, *EVERY_STEP, "--training.exit_step", "4")
        with bench.ranks(run, *words) as ranks:
            codes = ranks.wait()
        text = "No space left on device"
        line = findings.ended_by_one_line(ranks, codes, text, f"{what}, stop")
        step = check_intact(findings, run, bench.reference, f"{what}, stop")
        findings.check(step == BASE_STEPS, f"{what}: step {step} is newest")
        findings.check(not clutter(run), f"{what}, stop: left behind {clutter(run)}")
        failures = _goes_on_when_there_is_room(bench, findings, run, checkpoints, what, options)
    return (
        f"stop: exit code 1, one line ({_cut(line)}), staging removed; continue: {failures} saves "
        "failed, and after room was made a later one succeeded, bit-equal"
    )


def _goes_on_when_there_is_room(
    bench: Bench, findings: Findings, run: Path, checkpoints: Path, what: str, options: str
) -> int:
    """The same with on_save_error=continue, on a disk of twice the size that is filled at first."""
    double = {"bytes": options.replace("size=", "size=1"), "inodes": "size=64m,nr_inodes=40"}[what]
    remount(checkpoints, double)
    fillers = _fill(checkpoints)
    last = 40
    words = (*AUTO, *EVERY_STEP, "--checkpoint.keep_last", "1", "--training.exit_step", str(last))
    with bench.ranks(run, *words, "--checkpoint.on_save_error", "continue") as ranks:
        ranks.until("training goes on")
        for filler in fillers:
            filler.unlink(missing_ok=True)
        codes = ranks.wait()
    findings.check(codes == [0, 0], f"{what}, continue: exit codes {codes} {ranks.errors()}")
    step = check_intact(findings, run, bench.reference, f"{what}, continue")
    findings.check(step == last, f"{what}, continue: step {step} is newest")
    findings.check(not clutter(run), f"{what}, continue: left behind {clutter(run)}")
    findings.check("training goes on" not in ranks.output(1), f"{what}: said by each rank")
    return ranks.output(0).count("training goes on")


def _fill(folder: Path) -> list[Path]:
    """Files that take nearly all that is left; a start needs an inode, a save more."""
    fillers: list[Path] = []
    try:
        while True:
            fillers.append(folder / f"filler{len(fillers)}")
            fillers[-1].write_bytes(b"\0" * 4096)
    except OSError:
        for filler in fillers[-3:]:
            filler.unlink(missing_ok=True)
        return fillers[:-3]


def _cut(line: str) -> str:
    """An error line without its folders."""
    return re.sub(r"/\S*/", "", line.removeprefix("error: ").partition("; free")[0])


def failing_writes(bench: Bench, findings: Findings) -> str:
    """EIO, EDQUOT and a short write, each on one rank."""
    lines = []
    for name, rank, file, inject, text in (
        ("EIO", 1, weights_file(1), "error=EIO:when=3", "rank 1: [Errno 5]"),
        ("EDQUOT", 0, optimizer_file(0), "error=EDQUOT:when=5", "rank 0: [Errno 122]"),
        ("a write that is lost", 1, optimizer_file(1), "retval=100:when=4", "rank 1"),
    ):
        run = bench.copy(f"write_{name.split()[-1]}")
        fault = Fault(rank, "write", (step_folder(run, 4, staging=True) / file,), inject)
        lines.append(_save_fails(bench, findings, run, fault, text, name))
    run = bench.copy("short")
    with bench.ranks(run, *AUTO, *EVERY_STEP, "--training.exit_step", "20") as ranks:
        ranks.until("resumed from")
        pid = ranks.processes[1].pid
        assert pid is not None
        # The kernel writes what is left up to the limit, and refuses the next write.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
        codes = ranks.wait()
    findings.ended_by_one_line(ranks, codes, "rank 1: [Errno 27]", "short write")
    check_intact(findings, run, bench.reference, "short write")
    findings.check(not clutter(run), f"short write: left behind {clutter(run)}")
    return (
        f"{len(lines) + 1} kinds: every rank ends with code 1, one line names rank and cause "
        f"({_cut(lines[0])}); never published"
    )


def _save_fails(
    bench: Bench, findings: Findings, run: Path, fault: Fault, text: str, name: str
) -> str:
    """Step 4 cannot be saved; then, without the fault, it is."""
    words = (*AUTO, *EVERY_STEP, "--training.exit_step", "4")
    with bench.ranks(run, *words, faults=[fault]) as ranks:
        codes = ranks.wait()
    line = findings.ended_by_one_line(ranks, codes, text, name)
    step = check_intact(findings, run, bench.reference, name)
    findings.check(step == BASE_STEPS, f"{name}: step {step} is newest")
    findings.check(not clutter(run), f"{name}: left behind {clutter(run)}")
    bench.train(run, *words)
    step = check_intact(findings, run, bench.reference, f"{name}, resumed")
    findings.check(step == 4, f"{name}: not resumed")
    return line


def failing_fsync(bench: Bench, findings: Findings) -> str:
    """Of a shard, the manifest and the staging folder."""
    for number, (rank, path) in enumerate(
        ((1, weights_file(1)), (0, optimizer_file(0)), (0, "manifest.json.tmp{pid}"), (0, ""))
    ):
        run = bench.copy(f"fsync_{number}")
        fault = Fault(
            rank, "fsync", (step_folder(run, 4, staging=True) / path,), "error=EIO:when=1"
        )
        name = f"fsync of {path or 'the folder'}"
        _save_fails(bench, findings, run, fault, f"rank {rank}: [Errno 5]", name)
    run = bench.copy("fsync_above")
    # The first is that of taking the folder.
    fault = Fault(0, "fsync", (run / "checkpoints",), "error=EIO:when=2")
    with bench.ranks(run, *AUTO, *EVERY_STEP, "--training.exit_step", "4", faults=[fault]) as ranks:
        codes = ranks.wait()
    findings.ended_by_one_line(ranks, codes, "is complete, but not named or", "fsync above")
    step = check_intact(findings, run, bench.reference, "fsync above")
    return (
        "shards of both ranks, manifest, folder: not published, named, saved when it works again; "
        f"of the folder above, after the rename: told as failed, and step {step} is whole"
    )


def read_only(bench: Bench, findings: Findings) -> str:
    """The disk is made read-only while the run goes on."""
    run = bench.copy("read_only")
    with bench.small_disk(run, "size=64m") as checkpoints:
        words = (*AUTO, *EVERY_STEP, "--checkpoint.keep_last", "2", "--training.exit_step", "50")
        with bench.ranks(run, *words) as ranks:
            ranks.until("successfully saved checkpoint at iteration       5")
            remount(checkpoints, "ro")
            codes = ranks.wait()
        line = findings.ended_by_one_line(ranks, codes, "Read-only file system", "read-only")
        step = check_intact(findings, run, bench.reference, "read-only")
        findings.check(step >= 5, f"step {step} is newest")
        remount(checkpoints, "rw")
        bench.train(run, *words)
        step = check_intact(findings, run, bench.reference, "writable again")
        findings.check(step == 50, "not resumed")
    return f"exit code 1, one line ({_cut(line)}); steps before intact; resumed when writable"


def slow_storage(bench: Bench, findings: Findings) -> str:
    """Every write and fsync of one rank takes a tenth of a second more."""
    run = bench.copy("slow")
    staging = step_folder(run, 4, staging=True)
    fault = Fault(
        *(1, "write,fsync", (staging / weights_file(1), staging / optimizer_file(1))),
        "delay_enter=100000",
    )
    begin = time.monotonic()
    words = (*AUTO, *EVERY_STEP, "--training.exit_step", "4")
    with bench.ranks(run, *words, faults=[fault]) as ranks:
        codes = ranks.wait()
        delayed = len([line for line in ranks.trace(1) if "resumed" not in line])
    findings.check(codes == [0, 0], f"exit codes {codes}")
    findings.check(delayed > 20, f"{delayed} delays only")
    step = check_intact(findings, run, bench.reference, "slow")
    findings.check(step == 4, f"step {step} is newest")
    return (
        f"saved in {time.monotonic() - begin:.0f} s with {delayed} calls delayed by 0.1 s; "
        "no report of the stall of its own"
    )


def ranks_disagree(bench: Bench, findings: Findings) -> str:
    """On the folder, from the start and from a later save on."""
    folders = [bench.root / "here", bench.root / "there"]
    arguments = [bench.arguments(f, *EVERY_STEP, "--training.exit_step", "4") for f in folders]
    with Ranks(arguments, bench.root) as ranks:
        codes = ranks.wait()
    text = "is not the folder that rank 0 writes to"
    line = findings.ended_by_one_line(ranks, codes, text, "start")
    findings.check("rank 1" in line, f"start: {line} does not name the rank")
    findings.check("iteration        1/" not in ranks.output(0), "start: a step was trained")
    written = [name for folder in folders[:1] for name in clutter(folder)]
    written += list((folders[1] / "checkpoints").glob("*"))
    findings.check(not written, f"start: {written} was written")
    here, there = bench.copy("folder"), bench.root / "linked"
    there.mkdir()
    (there / "checkpoints").symlink_to(here / "checkpoints")
    last = ("--training.exit_step", "50")
    arguments = [bench.arguments(f, *AUTO, *EVERY_STEP, *last) for f in (here, there)]
    with Ranks(arguments, bench.root) as ranks:
        ranks.until("successfully saved checkpoint at iteration       5")
        (there / "elsewhere").mkdir()
        (there / "link").symlink_to(there / "elsewhere")
        (there / "link").rename(there / "checkpoints")
        codes = ranks.wait()
    findings.ended_by_one_line(ranks, codes, "rank 1: ", "save")
    check_intact(findings, here, bench.reference, "save")
    findings.check(not clutter(here), f"save: left behind {clutter(here)}")
    findings.check(not list((there / "elsewhere").iterdir()), "save: written elsewhere")
    return "refused at the start and at the save, by one line that names rank and folder"


def two_runs(bench: Bench, findings: Findings) -> str:
    """A second run is started in the folder of one that is alive, here or cut off elsewhere."""
    run = bench.copy("two_runs")
    words = (*AUTO, *EVERY_STEP, "--training.exit_step")
    with bench.ranks(run, *words, "40") as first:
        first.until("successfully saved checkpoint at iteration       5")
        for rank in (0, 1):
            first.signal(rank, signal.SIGSTOP)  # else it ends while the second waits for that
        with bench.ranks(run, *words, "40") as second:
            codes = second.wait(90)
        for rank in (0, 1):
            first.signal(rank, signal.SIGCONT)
        line = findings.ended_by_one_line(second, codes, "written by another run", "same host")
        findings.check(first.wait() == [0, 0], f"same host: the first failed: {first.errors()}")
    step = check_intact(findings, run, bench.reference, "same host")
    findings.check(step == 40, f"same host: the first got to step {step}")
    run = bench.copy("cut_off")
    # Though it may go on after a save that fails.
    on = ("--checkpoint.on_save_error", "continue")
    with bench.ranks(run, *words, "58", *on) as first:
        first.until("successfully saved checkpoint at iteration       5")
        for rank in (0, 1):
            first.signal(rank, signal.SIGSTOP)
        owner = run / "checkpoints" / OWNER_FILE
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"place": "elsewhere"}))
        with bench.ranks(run, *words, "20") as second:
            findings.check(second.wait() == [0, 0], f"cut off: not taken over: {second.errors()}")
        findings.check("on elsewhere)" in second.output(0), "not said")
        for rank in (0, 1):
            first.signal(rank, signal.SIGCONT)
        codes = first.wait()
    findings.ended_by_one_line(first, codes, "has been taken by another run", "cut off")
    findings.check("iteration       58/" not in first.output(0), "cut off: trained to its end")
    step = check_intact(findings, run, bench.reference, "cut off")
    findings.check(step == 20, f"cut off: step {step} is newest")
    findings.check(not clutter(run), f"cut off: left behind {clutter(run)}")
    return (
        f"same host: refused ({_cut(line)}), the first goes on; another host: taken over and said, "
        "the next save of the first fails by one line and touches nothing"
    )


def retention(bench: Bench, findings: Findings) -> str:
    """With folders that are no complete steps among those that are."""
    run = bench.copy("retention")
    (step_folder(run, 2) / "manifest.json").unlink()
    for name in ("step_00000009", "step_00000099", ".staging_step_00000007", ".removed_step_1"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / weights_file(0)).write_bytes(b"part")
    words = (*AUTO, *EVERY_STEP, *_KEEP_TWO, "--checkpoint.keep_every", "4")
    bench.train(run, *words, "--training.exit_step", "12")
    kept = sorted(complete_steps(run / "checkpoints"))
    findings.check(kept == [4, 8, 11, 12], f"kept {kept}")
    check_intact(findings, run, bench.reference, "retention")
    return (
        f"keep_last 2, keep_every 4, 12 steps: kept {kept}; incomplete folders count for nothing; "
        "kills while a step is removed are among the stages of row 1"
    )
