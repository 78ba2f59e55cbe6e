"""Rows of storage that fails a save: full, failing, read-only and slow disks.

Next file: `sharing.py`.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

from bench import (
    AUTO,
    BASE_STEPS,
    EVERY_STEP,
    KEEP_TWO,
    Bench,
    Findings,
    check_intact,
    clutter,
    remount,
    short,
    step_folder,
)
from ranks import Fault

from megagpt.checkpoint.format.manifest import optimizer_file, weights_file


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
        f"stop: exit code 1, one line ({short(line)}), staging removed; continue: {failures} saves "
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
        f"({short(lines[0])}); never published"
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
        words = (*AUTO, *EVERY_STEP, *KEEP_TWO, "--training.exit_step", "50")
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
    return f"exit code 1, one line ({short(line)}); steps before intact; resumed when writable"


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
