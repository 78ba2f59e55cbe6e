"""What is in a run folder and in a step folder, for people to read, and what of it may go.

Reads manifests only, no tensor. Knows no torch. Next file: `compare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.checkpoint.directory import (
    LATEST_FILE,
    LEFTOVERS,
    complete_steps,
    find_checkpoints,
    line_of_steps,
    read_latest,
    steps_to_remove,
)
from megagpt.checkpoint.format.manifest import (
    KINDS,
    MANIFEST_FILE,
    CheckpointManifest,
    Layout,
    read_manifest,
)
from megagpt.checkpoint.format.pieces import TensorRecord

_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class StepSummary:
    """A step folder of a run that has a manifest."""

    step: int
    directory: Path
    num_bytes: int
    """On disk."""
    manifest: CheckpointManifest | None
    """None where it cannot be read."""
    problem: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True)
class RunSummary:
    """The checkpoints of a run."""

    checkpoints: Path
    """Folder of the steps."""
    steps: list[StepSummary]
    """By number."""
    latest: str
    """What the file `latest` says, in words."""
    resumed: int | None
    """The step that a resume would try first; None if no manifest can be read."""
    leftovers: list[str]
    """Folders and files that a killed process left; the next resume removes those with a dot."""


def is_step_folder(path: Path) -> bool:
    """Whether a path means one step, and not a run."""
    return (path / MANIFEST_FILE).is_file()


def describe_run(path: Path) -> RunSummary:
    """The steps of a run folder, or of the folder `checkpoints` in it.

    Raises:
        ValueError: If there is no complete step.
    """
    candidates = list(find_checkpoints(path))
    checkpoints = candidates[0].parent
    folders = complete_steps(checkpoints)
    steps = [_describe_step(step, directory) for step, directory in folders.items()]
    sound = {each.directory: each.step for each in steps if each.manifest is not None}
    left = {path.name for pattern in LEFTOVERS for path in checkpoints.glob(pattern)}
    left |= {path.name for path in checkpoints.glob("step_*") if not is_step_folder(path)}
    return RunSummary(
        checkpoints=checkpoints,
        steps=steps,
        latest=_latest_in_words(checkpoints, steps),
        resumed=next((sound[each] for each in candidates if each in sound), None),
        leftovers=sorted(left - {directory.name for directory in folders.values()}),
    )


def prunable_steps(run: RunSummary, *, keep_last: int, keep_every: int) -> list[StepSummary]:
    """The steps that retention lets go, as in `steps_to_remove`; damaged ones stay, uncounted."""
    sound = {each.step: each for each in run.steps if each.manifest is not None}
    if run.resumed is None:
        return []
    line = line_of_steps({step: each.directory for step, each in sound.items()}, run.resumed)
    gone = steps_to_remove(list(line), keep_last=keep_last, keep_every=keep_every)
    return [sound[step] for step in gone]


def layout_in_words(layout: Layout) -> str:
    """A layout in one line."""
    tp, pp = layout.tensor_parallel_size, layout.pipeline_parallel_size
    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    degrees = {"dp": layout.world_size // (tp * pp), "tp": tp, "pp": pp}
    words = [ranks, *(f"{axis}={size}" for axis, size in degrees.items() if size > 1)]
    offload = "" if layout.offload == "none" else f", optimizer on {layout.offload}"
    return f"{' '.join(words)}, ZeRO {layout.zero_stage}{offload}"


def num_parameters(manifest: CheckpointManifest) -> int:
    """Elements of all parameters, without the padding of the vocabulary."""
    return sum(record.num_elements for record in manifest.tensors.values())


def bytes_by_kind(manifest: CheckpointManifest) -> Mapping[str, int]:
    """Bytes of each kind, and of what is none: headers and states of random generators."""
    kinds = dict.fromkeys(KINDS, _ELEMENT_BYTES * num_parameters(manifest))
    total = sum(record.num_bytes for record in manifest.files.values())
    return {**kinds, "other": total - sum(kinds.values())}


def largest_tensors(manifest: CheckpointManifest, count: int) -> list[tuple[str, TensorRecord]]:
    """The parameters of most elements by name, the largest first."""
    return sorted(manifest.tensors.items(), key=lambda each: -each[1].num_elements)[:count]


def bytes_in_words(num_bytes: float) -> str:
    """A size with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.{0 if unit == 'bytes' else 1}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _describe_step(step: int, directory: Path) -> StepSummary:
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    try:
        return StepSummary(step, directory, num_bytes, read_manifest(directory))
    except ValueError as error:
        return StepSummary(step, directory, num_bytes, None, str(error))


def _latest_in_words(checkpoints: Path, steps: list[StepSummary]) -> str:
    named = read_latest(checkpoints)
    if named is None:
        return "damaged" if (checkpoints / LATEST_FILE).exists() else "not there"
    step, sha256 = named
    found = next((each for each in steps if each.step == step), None)
    if found is None:
        return f"names step {step}, which is not there or not complete"
    if found.manifest is None or found.manifest.sha256 != sha256:
        return f"names step {step}, which has another manifest"
    return f"names step {step}"
