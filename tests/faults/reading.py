"""Rows of faults that a resume meets: damaged, foreign, hostile checkpoints, other settings.

Next file: `resuming.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import xxhash
from bench import AUTO, BASE_STEPS, EVERY_STEP, Bench, Findings, check_intact, step_folder
from ranks import Fault

from megagpt.checkpoint.directory import find_checkpoint
from megagpt.checkpoint.format.manifest import (
    KINDS,
    MANIFEST_FILE,
    optimizer_file,
    read_manifest,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.pieces import TensorRecord
from megagpt.checkpoint.format.reader import CheckpointReader, verify_checkpoint

_NEXT = (*EVERY_STEP, "--training.exit_step", str(BASE_STEPS + 1))
_FLIPS = 1200


def _refused(
    bench: Bench,
    findings: Findings,
    run: Path,
    load: str,
    text: str,
    name: str,
    *extra: str,
    world_size: int = 1,
) -> str:
    """A resume from `load` ends with one line that holds a text; the line."""
    words = (*_NEXT, "--checkpoint.load", load, *extra)
    with bench.ranks(run, *words, world_size=world_size) as ranks:
        codes = ranks.wait()
    findings.check("iteration        4/" not in ranks.output(0), f"{name}: trained on")
    return findings.ended_by_one_line(ranks, codes, text, name)


def _falls_back(bench: Bench, findings: Findings, run: Path, text: str, name: str) -> None:
    """`auto` takes the step before the newest, and says why."""
    with bench.ranks(run, *_NEXT, *AUTO) as ranks:
        codes = ranks.wait()
    output = ranks.output(0)
    findings.check(codes == [0, 0], f"{name}: exit codes {codes}: {output[-600:]}")
    findings.check("at step 2" in output, f"{name}: did not fall back one step: {output[-600:]}")
    lines = [line for line in output.splitlines() if line.startswith("warning:")]
    findings.check(any(text in line for line in lines), f"{name}: {text!r} is not said: {lines}")
    check_intact(findings, run, bench.reference, name)


def truncated(bench: Bench, findings: Findings) -> str:
    """Each file of the newest step, cut to nothing, to half, and by one byte."""
    directory = step_folder(bench.base, BASE_STEPS)
    cuts = 0
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            problems = verify_checkpoint(directory)
            findings.check(
                len(problems) == 1 and path.name in problems[0], f"{path.name} {size}: {problems}"
            )
            cuts += 1
        path.write_bytes(content)
    for name, size in ((optimizer_file(1), 0), (weights_file(0), -1), (MANIFEST_FILE, -1)):
        run = bench.copy(f"cut_{name}")
        path = step_folder(run, BASE_STEPS) / name
        path.write_bytes(path.read_bytes()[:size] if size else b"")
        # Shards are read once the ranks have met: one of them tells.
        size = 1 if name == MANIFEST_FILE else 2
        words = (str(path.parent), name, f"{name} cut, step")
        _refused(bench, findings, run, *words, world_size=size)
        _falls_back(bench, findings, run, name, f"{name} cut, auto")
    return f"{cuts} cuts all named by file; a step folder is refused, auto falls back one step"


def flipped(bench: Bench, findings: Findings) -> str:
    """Single bits of all files of a checkpoint that the trainer wrote, in turn."""
    run = bench.copy("flipped")
    directory, latest = step_folder(run, BASE_STEPS), run / "checkpoints" / "latest"
    with CheckpointReader(directory) as reader:
        good = {(n, k): reader.tensor(n, k) for n in reader.manifest.tensors for k in KINDS}
    files = [*sorted(directory.iterdir()), latest]
    generator = random.Random(0)
    caught = harmless = 0
    for number in range(_FLIPS):
        path = files[number % len(files)]
        position, bit = generator.randrange(path.stat().st_size), 1 << generator.randrange(8)
        _flip(path, position, bit)
        name = f"{path.name} byte {position} bit {bit}"
        if path == latest:
            # It is only a hint: whatever it says, the newest step is found.
            findings.check(find_checkpoint(run) == directory, f"{name}: another step is taken")
            harmless += 1
        elif _is_caught(findings, directory, path, good, name):
            caught += 1
        _flip(path, position, bit)
    findings.check(caught + harmless == _FLIPS, f"{caught} of {_FLIPS - harmless} caught")
    findings.check(not verify_checkpoint(directory), "not as before")
    for name in (weights_file(1), MANIFEST_FILE):
        run = bench.copy(f"flipped_{name}")
        path = step_folder(run, BASE_STEPS) / name
        _flip(path, path.stat().st_size // 2, 1)
        _refused(bench, findings, run, str(path.parent), name, f"{name} flipped, step")
        _falls_back(bench, findings, run, name, f"{name} flipped, auto")
    return (
        f"{caught} of {_FLIPS - harmless} in shards and manifest caught before a tensor was "
        f"used; {harmless} in latest changed nothing"
    )


def _flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def _is_caught(findings: Findings, directory: Path, path: Path, good: dict, name: str) -> bool:
    """Whether reading all tensors fails, and gives none that is not what was written."""
    try:
        with CheckpointReader(directory) as reader:
            for shard in range(reader.manifest.layout.world_size):
                reader.extra(shard, "random.cpu")
            for tensor, kind in good:
                values = reader.tensor(tensor, kind)
                if not np.array_equal(values, good[tensor, kind]):
                    findings.check(False, f"{name}: {kind} of {tensor} was given out")
    except ValueError as error:
        findings.check(path.name in str(error), f"{name}: {error} does not name it")
        return True
    findings.check(False, f"{name}: not noticed")
    return False


def foreign_files(bench: Bench, findings: Findings) -> str:
    """A file missing, two of the same size swapped, strays, shards of another world size."""
    run = bench.copy("missing")
    directory = step_folder(run, BASE_STEPS)
    (directory / weights_file(1)).unlink()
    _refused(bench, findings, run, str(directory), f"{weights_file(1)} is missing", "missing")
    _falls_back(bench, findings, run, weights_file(1), "missing, auto")

    run = bench.copy("swapped")
    directory = step_folder(run, BASE_STEPS)
    before = step_folder(run, BASE_STEPS - 1) / weights_file(0)
    aside = directory / weights_file(0)
    findings.check(before.stat().st_size == aside.stat().st_size, "swapped: sizes differ")
    shutil.copy(before, aside)
    _refused(bench, findings, run, str(directory), f"{weights_file(0)} is damaged", "swapped")
    _falls_back(bench, findings, run, weights_file(0), "swapped, auto")

    run = bench.copy("stray")
    directory = step_folder(run, BASE_STEPS)
    shutil.copy(directory / weights_file(0), directory / f"{weights_file(0)}.orig")
    for name in (weights_file(2), optimizer_file(2), ".metadata"):
        (directory / name).write_bytes(b"of another world size")
    with bench.ranks(run, *_NEXT, *AUTO) as ranks:
        codes = ranks.wait()
    findings.check(codes == [0, 0], f"stray: exit codes {codes}")
    findings.check("at step 3" in ranks.output(0), "stray: the newest step was not taken")
    check_intact(findings, run, bench.reference, "stray")
    said = ".orig" in ranks.output(0)
    findings.check(said, "stray: the resume does not say that files were ignored")
    return "missing and swapped: refused by name, auto falls back; strays ignored" + (
        " and named" * said
    )


def failing_read(bench: Bench, findings: Findings) -> str:
    """Of a shard, on the last rank."""
    run = bench.copy("failing_read")
    path = step_folder(run, BASE_STEPS) / optimizer_file(1)
    fault = Fault(1, "preadv,?preadv2", (path,), "error=EIO:when=1")
    with bench.ranks(run, *AUTO, *_NEXT, faults=[fault]) as ranks:
        codes = ranks.wait()
    line = findings.ended_by_one_line(ranks, codes, "rank 1: [Errno 5]", "read")
    findings.check("warning" not in ranks.output(0), "an older step was taken")
    bench.train(run, *AUTO, *_NEXT)
    step = check_intact(findings, run, bench.reference, "read")
    findings.check(step == BASE_STEPS + 1, f"not resumed when it works again, step {step}")
    line = line.removeprefix("error: ").replace(f"{path.parent}/", "").partition(";")[0]
    return f"exit code 1, one line ({line}); resumed when it works again"


def odd_latest(bench: Bench, findings: Findings) -> str:
    """What `latest` may hold; the newest complete step is resumed whatever it is."""
    outside = bench.root / "outside.json"
    outside.write_text(json.dumps({"step": "step_00000001", "sha256": "0" * 64}))
    contents = {
        "empty": "",
        "garbage": "\0\xff}{",
        "parent": "../x",
        "a path": json.dumps({"step": "../step_00000001", "sha256": "0" * 64}),
        "an incomplete step": json.dumps({"step": "step_00000004", "sha256": "0" * 64}),
        "a step that is gone": json.dumps({"step": "step_00000050", "sha256": "0" * 64}),
        "nested": "[" * 100_000,
        "symlink": None,
        "dangling": None,
        "absent": None,
    }
    for name, content in contents.items():
        run = bench.copy(f"latest_{name}")
        incomplete = step_folder(run, 4)
        incomplete.mkdir()
        (incomplete / weights_file(0)).write_bytes(b"part")
        latest = run / "checkpoints" / "latest"
        latest.unlink()
        if content is not None:
            latest.write_bytes(content.encode("latin-1"))
        elif name != "absent":
            latest.symlink_to(outside if name == "symlink" else bench.root / "nowhere")
        with bench.ranks(run, *_NEXT, *AUTO, world_size=1) as ranks:
            codes = ranks.wait()
        output = ranks.output(0)
        findings.check(codes == [0], f"{name}: exit codes {codes}: {output[-600:]}")
        findings.check("step_00000003 at step 3" in output, f"{name}: {output[-600:]}")
        findings.check(
            latest.is_file() and not latest.is_symlink() and "step_00000004" in latest.read_text(),
            f"{name}: latest is not mended",
        )
    findings.check("step_00000001" in outside.read_text(), "a file outside was written")
    return f"{len(contents)} kinds ({', '.join(contents)}): step 3 resumed, latest written anew"


def other_content(bench: Bench, findings: Findings) -> str:
    """A whole manifest that lacks a tensor, or a piece of one; a checkpoint of another model."""
    directory = step_folder(bench.base, BASE_STEPS)
    manifest = read_manifest(directory)
    names = list(manifest.tensors)
    split = next(n for n in names if len(manifest.tensors[n].pieces) > 1)
    record = manifest.tensors[split]
    changed = {
        "a tensor missing": {n: r for n, r in manifest.tensors.items() if n != names[1]},
        "a piece missing": dict(manifest.tensors)
        | {split: TensorRecord.of(record.shape, record.pieces[1:])},
        "a tensor of another name": {
            (f"x.{n}" if n == names[1] else n): r for n, r in manifest.tensors.items()
        },
    }
    for name, tensors in changed.items():
        run = bench.copy(name.replace(" ", "_"))
        step = step_folder(run, BASE_STEPS)
        write_manifest(step, dataclasses.replace(manifest, tensors=tensors))
        _refused(bench, findings, run, str(step), step.name, name)
    run = bench.root / "other_model"
    bench.train(run, "--model.num_layers", "2", "--training.exit_step", "2", world_size=1)
    _refused(
        *(bench, findings, bench.root / "fresh", str(run)),
        *("model.num_layers: saved 2, asked 1", "another model"),
    )
    return "refused, naming the parameter or setting, before a step is trained"


def drifted(bench: Bench, findings: Findings) -> str:
    """One changed setting each; refused by name, then allowed by name and logged."""
    assert bench.base
    drifts = {
        "optimizer.betas": "[0.8, 0.95]",
        "optimizer.lr": "5e-4",
        "batch.global_batch_size": "16",
        "training.precision": "bf16",
        "model.dropout": "0.2",
        "model.hidden_size": "64",
        "model.num_layers": "2",
        "model.seq_length": "16",
    }
    never = []
    for key, value in drifts.items():
        run = bench.copy(f"drift_{key}")
        setting = (f"--{key}", value)
        line = _refused(bench, findings, run, "auto", f"{key}: saved", key, *setting)
        allowed = re.search(r"--checkpoint.override '(\[[^']*\])'", line)
        others = allowed[1] if allowed else "[]"
        if key not in others:
            never.append(key)
            named = ("--checkpoint.override", f"[{key}]")
            _refused(bench, findings, run, "auto", f"{key}: saved", f"{key}!", *setting, *named)
            continue
        words = (*_NEXT, *AUTO, *setting, "--checkpoint.override", others)
        with bench.ranks(run, *words, world_size=1) as ranks:
            codes = ranks.wait()
        output = ranks.output(0)
        findings.check(codes == [0], f"{key} overridden: exit codes {codes}: {output[-600:]}")
        findings.check(f"overridden: {key}: saved" in output, f"{key}: not logged")
        findings.check("iteration        4/" in output, f"{key}: did not go on")
    shape = ["model.hidden_size", "model.num_layers", "model.seq_length"]
    findings.check(never == shape, f"never allowed: {never}")
    return (
        f"{len(drifts)} settings refused by name; {len(drifts) - len(never)} allowed by "
        f"override and logged, never {', '.join(never)} (positions are learned)"
    )


def nothing_to_resume(bench: Bench, findings: Findings) -> str:
    """`auto` with an empty and an absent folder, and paths that hold nothing."""
    assert bench.data
    empty = bench.root / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for name, run, load in (
        ("absent, auto", bench.root / "never", "auto"),
        ("empty, auto", empty, "auto"),
        ("absent path", bench.root / "never", str(bench.root / "nowhere")),
        ("empty path", bench.root / "never", str(empty)),
    ):
        _refused(bench, findings, run, load, "holds no complete checkpoint", name)
        findings.check(not list(empty.glob("checkpoints/*")), f"{name}: something was written")
    findings.check(not (bench.root / "never").exists(), "a folder was made")
    return "4 ways: exit code 1, one line, no folder made"


class _Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def hostile(bench: Bench, findings: Findings) -> str:
    """Pickles in place of each file, and beside them."""
    marker = bench.root / "payload_ran"
    content = pickle.dumps(_Payload(marker))
    pickle.loads(pickle.dumps(_Payload(bench.root / "payload_works")))
    findings.check((bench.root / "payload_works").exists(), "the payload is none")
    places = [weights_file(0), optimizer_file(1), MANIFEST_FILE, "../latest"]
    for place in places:
        run = bench.copy(f"hostile_{Path(place).name}")
        directory = step_folder(run, BASE_STEPS)
        (directory / place).write_bytes(content)
        findings.check(
            bool(verify_checkpoint(directory)) != (place == "../latest"), f"{place}: verified"
        )
        if place == "../latest":
            with bench.ranks(run, *_NEXT, *AUTO, world_size=1) as ranks:
                codes = ranks.wait()
            findings.check(codes == [0], f"{place}: exit codes {codes}")
            findings.check("at step 3" in ranks.output(0), f"{place}: not resumed")
            continue
        name = Path(place).name
        _refused(bench, findings, run, str(directory), name, f"{place}, step")
        _falls_back(bench, findings, run, name, f"{place}, auto")
        # A manifest that vouches for the pickle: no reader of ours can be made to unpickle it.
        if name != MANIFEST_FILE:
            _vouch_for(bench.copy(f"vouched_{name}"), name, content, bench, findings)
    run = bench.copy("hostile_beside")
    for name in (".metadata", "mp_rank_00_model_states.pt", "random_states.pkl", "rng.pt"):
        (step_folder(run, BASE_STEPS) / name).write_bytes(content)
    bench.train(run, *_NEXT, *AUTO)
    check_intact(findings, run, bench.reference, "beside")
    findings.check(not marker.exists(), "the payload ran")
    return f"payload not run in {2 * len(places)} places; refused by name, strays never read"


def _vouch_for(run: Path, name: str, content: bytes, bench: Bench, findings: Findings) -> None:
    """Puts a pickle into a step whose manifest has its length and hash."""
    directory = step_folder(run, BASE_STEPS)
    (directory / name).write_bytes(content)
    manifest = read_manifest(directory)
    digest = xxhash.xxh3_128_hexdigest(content)
    record = manifest.files[name]._replace(num_bytes=len(content), block_hashes=(digest,))
    write_manifest(
        directory, dataclasses.replace(manifest, files=dict(manifest.files) | {name: record})
    )
    _refused(bench, findings, run, str(directory), "safetensors", f"{name}, vouched for")
