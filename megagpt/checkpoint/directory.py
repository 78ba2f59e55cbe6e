"""The folder of a run's checkpoints: what is complete, what is newest, what may go.

A step appears by one rename and disappears by one, so that no reader ever sees a part of one.
`latest` names the newest for people and scripts; nothing depends on it being there.
Knows no torch. Next file: `format/manifest.py`.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from megagpt.checkpoint.format.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    CheckpointState,
    read_links,
    read_manifest,
    read_state,
)
from megagpt.checkpoint.format.shard_file import DamagedCheckpoint
from megagpt.checkpoint.owner import OWNER_FILE
from megagpt.files import decode_json, encode_json, sync_directory, write_atomically

logger = logging.getLogger("megagpt")

_T = TypeVar("_T")
LATEST_FILE = "latest"
_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = ".replaced_"
LEFTOVERS = (
    *(".staging_step_*", f"{_REPLACED}step_*", ".removed_step_*"),
    *(f"{LATEST_FILE}.tmp*", f"{OWNER_FILE}.tmp*"),
)
"""What a killed process leaves."""


def step_directory(checkpoints: Path, step: int) -> Path:
    """Folder of one step."""
    return checkpoints / f"step_{step:08d}"


def staging_directory(target: Path) -> Path:
    """Where a step is written before it is complete."""
    return target.with_name(f".staging_{target.name}")


def complete_steps(checkpoints: Path) -> dict[int, Path]:
    """Step folders that have a manifest, by step, in order."""
    steps = {}
    for path in checkpoints.glob(f"*step_*/{MANIFEST_FILE}"):
        name = path.parent.name
        if match := _STEP.fullmatch(name):
            steps[int(match[1])] = path.parent
        elif match := _STEP.fullmatch(name.removeprefix(_REPLACED)):
            # Killed between the two renames of `publish`: it counts under its old name.
            steps.setdefault(int(match[1]), path.parent)
    return dict(sorted(steps.items()))


def find_checkpoints(path: Path) -> Iterator[Path]:
    """The step folders meant by a path, the one to resume first.

    A step folder means itself. A run folder means its newest step and, should that be damaged, the
    ones that led to it. The newest is the one that was saved last, which is not always the one of
    the highest number: a run may have gone back and be on its way again.

    Raises:
        ValueError: If there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return iter([path])
    for root in (path / "checkpoints", path):
        steps = complete_steps(root)
        if steps:
            return (steps[step] for step in line_of_steps(steps, _newest(root, steps)))
    raise ValueError(
        f"{path} holds no complete checkpoint; train first, name another folder, "
        "or start afresh with --checkpoint.load none"
    )


def find_checkpoint(path: Path) -> Path:
    """The step folder meant by a path: itself, or the newest complete one of a run folder.

    Raises:
        ValueError: If there is none.
    """
    return next(find_checkpoints(path))


def newest_readable(path: Path) -> CheckpointManifest:
    """The manifest of the first of `find_checkpoints` that is not damaged.

    Raises:
        ValueError: If there is none; the last one's damage, if all are damaged.
    """
    return _first_sound(path, read_manifest)


def newest_state(path: Path) -> CheckpointState:
    """The state in it, read from its first lines alone; damage behind them is not seen.

    Raises:
        As `newest_readable`.
    """
    return _first_sound(path, read_state)


def _first_sound(path: Path, read: Callable[[Path], _T]) -> _T:
    error: DamagedCheckpoint | None = None
    for directory in find_checkpoints(path):
        try:
            return read(directory)
        except DamagedCheckpoint as caught:
            error = caught
    assert error is not None
    raise error


def line_of_steps(steps: Mapping[int, Path], newest: int) -> Iterator[int]:
    """The newest step and those that led to it, backwards; others are of a line that was left.

    Each manifest tells them. Where the newest's cannot be read, the next lower step stands for it.
    """
    step: int | None = newest
    while step is not None:
        yield step
        links = read_links(steps[step])
        if links is not None:
            for earlier, sha256 in links.line:
                found = read_links(steps[earlier]) if earlier in steps else None
                if found is not None and found.sha256 == sha256:
                    yield earlier
            return
        step = max((each for each in steps if each < step), default=None)


def newest_sha256(checkpoints: Path) -> str | None:
    """Hash of the manifest of the step that was saved last; None if there is none to read."""
    steps = complete_steps(checkpoints)
    links = read_links(steps[_newest(checkpoints, steps)]) if steps else None
    named = read_latest(checkpoints)
    return links.sha256 if links else named and named[1]


def _newest(checkpoints: Path, steps: dict[int, Path]) -> int:
    """The step that `latest` names, or one that was saved after it."""
    links = {step: found for step in steps if (found := read_links(steps[step])) is not None}
    by_hash = {found.sha256: step for step, found in links.items()}
    later = {found.previous: step for step, found in links.items()}
    named, sha256 = read_latest(checkpoints) or (None, None)
    newest = by_hash.get(sha256, later.get(sha256)) if sha256 else None
    if newest is None and named in steps:
        newest = named  # its manifest cannot be read
    if newest is None:
        # Nothing names one.
        newest = max(links, key=lambda step: (links[step].created, step), default=max(steps))
    # Between the rename of a step and the writing of `latest` a kill leaves one step unnamed.
    following: int | None = newest
    while following is not None:
        newest = following
        following = later.pop(links[newest].sha256, None) if newest in links else None
    return newest


def read_latest(checkpoints: Path) -> tuple[int, str] | None:
    """What `latest` says, (step, hash of its manifest); None where it says nothing sensible."""
    try:
        values = decode_json((checkpoints / LATEST_FILE).read_bytes())
        match = _STEP.fullmatch(values["step"])
        return (int(match[1]), str(values["sha256"])) if match else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.info(f"warning: {checkpoints / LATEST_FILE} is damaged; it is not used")
        return None


def write_latest(checkpoints: Path, step: int, sha256: str) -> None:
    """Names the newest step, whole or not at all."""
    name = step_directory(checkpoints, step).name
    write_atomically(checkpoints / LATEST_FILE, encode_json({"step": name, "sha256": sha256}))


def publish(staging: Path, target: Path) -> None:
    """Makes a staged step appear; one that is there under its name goes when the new one is in."""
    sync_directory(staging)
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    staging.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what a killed run left half-written or half-removed; called by one process."""
    for path in sorted(checkpoints.glob(f"{_REPLACED}step_*")):
        target = path.with_name(path.name.removeprefix(_REPLACED))
        if not (target / MANIFEST_FILE).is_file() and (path / MANIFEST_FILE).is_file():
            # Killed between the two renames of `publish`.
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
    for pattern in LEFTOVERS:
        for path in checkpoints.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_step(directory: Path) -> None:
    """Removes a step: its name first, then its files."""
    removed = directory.with_name(f".removed_{directory.name.removeprefix(_REPLACED)}")
    shutil.rmtree(removed, ignore_errors=True)
    directory.rename(removed)
    sync_directory(directory.parent)
    shutil.rmtree(removed, ignore_errors=True)


def steps_to_remove(line: list[int], *, keep_last: int, keep_every: int) -> list[int]:
    """Which complete steps retention lets go, the oldest first.

    Args:
        line: The steps that led to the newest, from it backwards; no other step is removed.
        keep_last: How many of the newest stay; 0 is all.
        keep_every: Multiples of this stay as well; 0 is none.
    """
    if keep_last == 0:
        return []
    old = reversed(line[keep_last:])
    return [step for step in old if not (keep_every and step % keep_every == 0)]
