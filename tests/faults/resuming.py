"""Rows of runs that end at any time and go on: kills, signals, other layouts, random states."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time

import numpy as np
import torch
import xxhash
from bench import (
    AUTO,
    BASE_STEPS,
    EVERY_STEP,
    Bench,
    Findings,
    Launch,
    check_intact,
    clutter,
    digest,
    losses,
    newest_step,
    step_folder,
)
from ranks import Fault

from megagpt.checkpoint.directory import find_checkpoint
from megagpt.checkpoint.format.manifest import optimizer_file, read_manifest, write_manifest
from megagpt.checkpoint.format.reader import CheckpointReader


def killed_under_the_launcher(bench: Bench, findings: Findings) -> str:
    """Kill -9 of a rank at a random step of `torchrun`; another launch goes on."""
    generator = random.Random(1)
    told = []
    for rank in (0, 1):
        run = bench.root / f"kill9_{rank}"
        words = ("--checkpoint.save_interval", "3", "--training.exit_step", "30")
        log = bench.root / f"{run.name}.log"
        kill_at = generator.randrange(4, 20)
        with Launch(bench.arguments(run, *words), log) as launch:
            launch.until(f"iteration {kill_at:8d}/")
            begin = time.monotonic()
            os.kill(launch.rank_pid(rank), signal.SIGKILL)
            code = launch.wait()
            seconds = time.monotonic() - begin
        findings.check(code != 0, f"rank {rank}: the launcher ended with 0")
        step = check_intact(findings, run, bench.reference, f"rank {rank} killed")
        trained = launch.output().count("] iteration ")
        findings.check(trained - step <= 3, f"rank {rank}: {trained - step} steps lost")
        with Launch(bench.arguments(run, *words, *AUTO), log) as launch:
            code = launch.wait()
        findings.check(code == 0, f"rank {rank}: the second launch ended with {code}")
        last = check_intact(findings, run, bench.reference, f"rank {rank} resumed")
        findings.check(last == 30, f"rank {rank}: trained to {last}")
        curve = losses(run)
        same = all(curve[s] == bench.reference_losses[s] for s in range(step + 1, 31))
        findings.check(same, f"rank {rank}: losses differ")
        findings.check(not clutter(run), f"left behind: {clutter(run)}")
        told.append(f"rank {rank}: {trained - step} of at most 3 lost, ended in {seconds:.0f} s")
    return "; ".join(told) + "; later losses, weights and moments bit-equal"


def resumed_on_another_layout(bench: Bench, findings: Findings) -> str:
    """Two data-parallel ranks, then two tensor-parallel ones."""
    run, last = bench.copy("reshaped"), BASE_STEPS + 20
    words = (*AUTO, *EVERY_STEP, "--training.exit_step", str(last))
    bench.train(run, *words, "--parallel.tensor_parallel_size", "2")
    curve = losses(run)
    differences = [
        abs(curve[step] - bench.reference_losses[step]) / bench.reference_losses[step]
        for step in range(BASE_STEPS + 1, last + 1)
    ]
    findings.check(max(differences) < 2e-6, f"losses differ by {max(differences):.1e}")
    with CheckpointReader(step_folder(run, last)) as reader:
        findings.check(reader.manifest.state.adam_step == last, "Adam counts other steps")
        findings.check(reader.manifest.layout.tensor_parallel_size == 2, "it is not split")
    return (
        f"dp2 to tp2: losses of 20 steps within {max(differences):.1e} relative (tolerance 2e-6); "
        "every pair is in tests/distributed/test_resume_any_layout.py"
    )


def dropout_and_random_states(bench: Bench, findings: Findings) -> str:
    """With dropout: killed and resumed against uninterrupted; random states of each rank."""
    dropout = (*EVERY_STEP, "--model.dropout", "0.1")
    straight, run = bench.root / "dropout_straight", bench.root / "dropout"
    bench.train(straight, *dropout, "--training.exit_step", "10")
    with bench.ranks(run, *dropout, "--training.exit_step", "60") as ranks:
        ranks.until("successfully saved checkpoint at iteration       5")
        ranks.signal(1, signal.SIGKILL)
        ranks.wait()
    killed_at = newest_step(run)
    last = max(10, killed_at + 2)
    if last > 10:
        bench.train(straight, *AUTO, *dropout, "--training.exit_step", str(last))
    bench.train(run, *AUTO, *dropout, "--training.exit_step", str(last))
    expected, found = losses(straight), losses(run)
    later = range(killed_at + 1, last + 1)
    findings.check(all(found[s] == expected[s] for s in later), "losses differ")
    same = digest(find_checkpoint(run)) == digest(find_checkpoint(straight))
    findings.check(same, "final weights or moments differ")
    findings.check(expected[2] != bench.reference_losses[2], "dropout has no effect")
    _restores_each_generator(bench, findings)
    return (
        f"killed after step {killed_at}: losses of the {len(later)} steps after it and the final "
        "state bit-equal; generators set apart in the checkpoint come back, each on its own rank"
    )


def _restores_each_generator(bench: Bench, findings: Findings) -> None:
    """Training draws nothing from torch's generators, so a checkpoint is given states of its own.

    A run that resumes it saves the next step with those of its ranks.
    """
    run = bench.copy("generators")
    directory = step_folder(run, BASE_STEPS)
    manifest = read_manifest(directory)
    files = dict(manifest.files)
    states = [torch.Generator().manual_seed(seed).get_state().numpy() for seed in (101, 102)]
    for rank, state in enumerate(states):
        path = directory / optimizer_file(rank)
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8:start])["random.cpu"]["data_offsets"]
        content[start + begin : start + end] = state.tobytes()
        path.write_bytes(content)
        digest_of_all = xxhash.xxh3_128_hexdigest(content)  # one block
        files[path.name] = files[path.name]._replace(block_hashes=(digest_of_all,))
    write_manifest(directory, dataclasses.replace(manifest, files=files))
    bench.train(run, "--checkpoint.load", str(directory), "--training.exit_step", "4")
    with CheckpointReader(step_folder(run, 4)) as reader:
        for rank, state in enumerate(states):
            found = reader.extra(rank, "random.cpu")
            findings.check(
                found is not None and np.array_equal(found, state),
                f"rank {rank}: its generator was not restored",
            )


def told_to_stop(bench: Bench, findings: Findings) -> str:
    """SIGTERM to one rank, with a save in the background that the disk is slow to take."""
    run = bench.copy("sigterm")
    words = (*AUTO, "--checkpoint.save_interval", "4", "--training.exit_step", "58")
    words = (*words, "--checkpoint.async_save", "true")
    slow = Fault(
        1, "fsync", (step_folder(run, 4, staging=True) / optimizer_file(1),), "delay_enter=3000000"
    )
    with bench.ranks(run, *words, faults=[slow]) as ranks:
        ranks.until("iteration        5/")
        ranks.signal(1, signal.SIGTERM)
        begin = time.monotonic()
        codes = ranks.wait()
        seconds = time.monotonic() - begin
    findings.check(codes == [75, 75], f"exit codes {codes}: {ranks.output(0)[-800:]}")
    findings.check(step_folder(run, 4).exists(), "the save in flight was lost")
    step = check_intact(findings, run, bench.reference, "SIGTERM")
    trained = ranks.output(0).count("] iteration ") + BASE_STEPS
    findings.check(step == trained, f"{trained - step} steps lost")
    bench.train(run, *AUTO, *EVERY_STEP, "--training.exit_step", "58")
    last = check_intact(findings, run, bench.reference, "resumed")
    findings.check(last == 58, f"trained to {last}")
    return (
        f"exit code 75 on both ranks after {seconds:.1f} s (3 s of them the delayed fsync of step "
        f"4, which is complete), 0 of {trained} steps lost, resumed bit-equal"
    )


def background_save_fails(bench: Bench, findings: Findings) -> str:
    """An I/O error in the thread that writes."""
    run = bench.copy("async")
    fault = Fault(
        *(1, "write", (step_folder(run, 6, staging=True) / optimizer_file(1),)),
        "error=EIO:when=3",
    )
    words = (*AUTO, "--checkpoint.save_interval", "3", "--training.exit_step", "58")
    with bench.ranks(run, *words, "--checkpoint.async_save", "true", faults=[fault]) as ranks:
        codes = ranks.wait()
    line = findings.ended_by_one_line(ranks, codes, "rank 1: [Errno 5]", "background")
    findings.check("not saved" in line, line)
    trained = ranks.output(0).count("] iteration ") + BASE_STEPS
    findings.check(trained <= 9, f"found out at step {trained}")
    step = check_intact(findings, run, bench.reference, "background")
    findings.check(step == BASE_STEPS, f"step {step} is newest")
    findings.check(not clutter(run), f"left behind: {clutter(run)}")
    return f"save of step 6 fails, the run ends after step {trained} with code 1 and one line"
