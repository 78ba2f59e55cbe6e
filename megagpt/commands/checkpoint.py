"""Looks into checkpoints: inspect, verify, diff, prune."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megagpt.checkpoint.compare import compare_states, compare_tensors
from megagpt.checkpoint.describe import (
    bytes_by_kind,
    bytes_in_words,
    describe_run,
    is_step_folder,
    largest_tensors,
    layout_in_words,
    num_parameters,
    prunable_steps,
)
from megagpt.checkpoint.directory import find_checkpoint, remove_step
from megagpt.checkpoint.format.manifest import KINDS, read_manifest
from megagpt.checkpoint.format.reader import CheckpointReader, stray_files, verify_checkpoint
from megagpt.config.command import EXIT_ERROR, UsageError


def main(options: argparse.Namespace) -> int | None:
    """Runs one of the commands."""
    return options.run(options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands and the flags of each."""
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="the steps of a run, or what a step holds")
    command.add_argument("path", type=Path, help="run folder or step folder")
    command.add_argument("--tensors", type=int, default=10, help="largest tensors to list")
    command.add_argument("--files", type=int, default=16, help="files to list")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="read every byte, compare with the manifest")
    command.add_argument("path", type=Path, nargs="+", help="step folder, or run folder: all steps")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "diff",
        help="compare two checkpoints of any layouts, tensor by tensor",
        epilog="The exit code is 0 if all tensors are equal within the tolerance, else 1.",
    )
    command.add_argument("first", type=Path, help="step folder, or run folder: its newest step")
    command.add_argument("second", type=Path)
    command.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference; 0: the same bits"
    )
    command.set_defaults(run=_diff)

    command = commands.add_parser("prune", help="remove old steps of a run")
    command.add_argument("path", type=Path, metavar="run", help="run folder")
    command.add_argument("--keep_last", type=int, required=True, help="newest steps that stay")
    command.add_argument("--keep_every", type=int, default=0, help="multiples that stay as well")
    command.add_argument("--dry_run", action="store_true", help="only tell what would go")
    command.set_defaults(run=_prune)


def _inspect(options: argparse.Namespace) -> None:
    if is_step_folder(options.path):
        return _inspect_step(options)
    run = describe_run(options.path)
    print(f"{run.checkpoints}: steps: {len(run.steps)}")
    for each in run.steps:
        row = f"damaged: {each.problem}"
        if each.manifest is not None:
            row = f"{each.manifest.created}  {layout_in_words(each.manifest.layout)}"
        print(f"step {each.step:>8}  {bytes_in_words(each.num_bytes):>10}  {row}")
    print(f"latest: {run.latest}")
    print(f"a resume takes: {'none' if run.resumed is None else f'step {run.resumed}'}")
    for name in run.leftovers:
        print(f"left by a killed process: {name}")


def _inspect_step(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.path)
    state, files = manifest.state, manifest.files
    print(f"{options.path}: step {state.step}, saved {manifest.created}")
    print(f"samples: {state.consumed_samples:,}, tokens: {state.consumed_tokens:,}")
    print(f"lr: {state.learning_rate:g}, updates of Adam: {state.adam_step:,}")
    print(f"layout: {layout_in_words(manifest.layout)}")
    print(f"precision: {state.config.training.precision}")
    print("versions: " + ", ".join(f"{name} {text}" for name, text in manifest.versions.items()))
    print(f"parameters: {num_parameters(manifest):,} in {len(manifest.tensors)} tensors")
    kinds = bytes_by_kind(manifest)
    print(
        f"size: {bytes_in_words(sum(kinds.values()))} in {len(files)} files: "
        + ", ".join(f"{kind} {bytes_in_words(size)}" for kind, size in kinds.items())
    )
    for name in sorted(files)[: options.files]:
        print(f"file: {name}, {bytes_in_words(files[name].num_bytes)}")
    if len(files) > options.files:
        print(f"and {len(files) - options.files} more files; --files lists more")
    for name, record in largest_tensors(manifest, options.tensors):
        print(
            f"tensor: {name} {list(record.shape)}, {record.num_elements:,} elements in "
            f"{record.num_pieces} pieces"
        )
    for name in stray_files(options.path, manifest):
        print(f"stray: {name}, which nothing reads")


def _verify(options: argparse.Namespace) -> int:
    code = 0
    for path in options.path:
        steps = [path] if is_step_folder(path) else [s.directory for s in describe_run(path).steps]
        for directory in steps:
            if not _verify_step(directory):
                code = EXIT_ERROR
    return code


def _verify_step(directory: Path) -> bool:
    started = time.perf_counter()
    problems = verify_checkpoint(directory)
    seconds = time.perf_counter() - started
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{directory}: {len(problems)} problems")
        return False
    manifest = read_manifest(directory)
    size = sum(record.num_bytes for record in manifest.files.values())
    print(
        f"{directory}: sound, {bytes_in_words(size)} in {len(manifest.files)} files, "
        f"{size / seconds / 1e9:.2f} GB/s"
    )
    for name in stray_files(directory, manifest):
        print(f"{directory}: {name} is not of the checkpoint; nothing reads it")
    return True


def _diff(options: argparse.Namespace) -> int:
    if not options.tolerance >= 0:
        raise UsageError(f"tolerance={options.tolerance} is negative; give 0 or more")
    kinds = KINDS if options.kind == "all" else (options.kind,)
    num_tensors, num_bit_equal, is_within = 0, 0, True
    with (
        CheckpointReader(find_checkpoint(options.first)) as first,
        CheckpointReader(find_checkpoint(options.second)) as second,
    ):
        print(f"first: {first.directory}\nsecond: {second.directory}")
        for line in compare_states(first.manifest, second.manifest):
            print(line)
        for each in compare_tensors(first, second, kinds=kinds):
            num_tensors += 1
            num_bit_equal += each.is_bit_equal
            is_within &= each.is_within(options.tolerance)
            if not each.is_bit_equal:
                found = each.problem or (
                    f"largest={each.largest:.3e} relative={each.relative:.3e} "
                    f"different={each.num_different} of {each.num_elements}"
                )
                print(f"{each.kind} {each.name}: {found}")
    if num_bit_equal == num_tensors:
        print(f"all {num_tensors} tensors are equal, bit by bit")
    else:
        within = "within" if is_within else "not within"
        print(
            f"{num_bit_equal} of {num_tensors} tensors are equal, bit by bit; all together "
            f"{within} the tolerance {options.tolerance:g}"
        )
    return 0 if is_within else EXIT_ERROR


def _prune(options: argparse.Namespace) -> None:
    if options.keep_last < 1 or options.keep_every < 0:
        raise UsageError(
            f"keep_last={options.keep_last}, keep_every={options.keep_every}; keep_last must be "
            "at least 1 and keep_every at least 0"
        )
    run = describe_run(options.path)
    for each in run.steps:
        if each.manifest is None:
            print(f"{each.directory} is damaged; it stays and does not count")
    freed = 0
    for each in prunable_steps(run, keep_last=options.keep_last, keep_every=options.keep_every):
        if not options.dry_run:
            remove_step(each.directory)
        freed += each.num_bytes
        verb = "would remove" if options.dry_run else "removed"
        print(f"{verb} {each.directory}, {bytes_in_words(each.num_bytes)}")
    print(f"{'would free' if options.dry_run else 'freed'} {freed:,} bytes")
