"""Rows of one folder and several that write to it or stand in it: ranks, runs, incomplete steps.

Next file: `reading.py`.
"""

from __future__ import annotations

import json
import signal

from bench import (
    AUTO,
    EVERY_STEP,
    KEEP_TWO,
    Bench,
    Findings,
    check_intact,
    clutter,
    short,
    step_folder,
)
from ranks import Ranks

from megagpt.checkpoint.directory import complete_steps
from megagpt.checkpoint.format.manifest import weights_file
from megagpt.checkpoint.owner import OWNER_FILE


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
        f"same host: refused ({short(line)}), the first goes on; another host: taken over and "
        "said, the next save of the first fails by one line and touches nothing"
    )


def retention(bench: Bench, findings: Findings) -> str:
    """With folders that are no complete steps among those that are."""
    run = bench.copy("retention")
    (step_folder(run, 2) / "manifest.json").unlink()
    for name in ("step_00000009", "step_00000099", ".staging_step_00000007", ".removed_step_1"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / weights_file(0)).write_bytes(b"part")
    words = (*AUTO, *EVERY_STEP, *KEEP_TWO, "--checkpoint.keep_every", "4")
    bench.train(run, *words, "--training.exit_step", "12")
    kept = sorted(complete_steps(run / "checkpoints"))
    findings.check(kept == [4, 8, 11, 12], f"kept {kept}")
    check_intact(findings, run, bench.reference, "retention")
    return (
        f"keep_last 2, keep_every 4, 12 steps: kept {kept}; incomplete folders count for nothing; "
        "kills while a step is removed are among the stages of row 1"
    )
