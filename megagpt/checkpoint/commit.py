"""What rank 0 does of a save: it makes a step of what all ranks have written, and removes old ones.

The folder is the run's own before each change, or nothing is changed. Next file: `directory.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch

from megagpt import __version__
from megagpt.checkpoint.directory import (
    newest_sha256,
    publish,
    remove_leftovers,
    remove_step,
    staging_directory,
    step_directory,
    steps_to_remove,
    write_latest,
)
from megagpt.checkpoint.format.manifest import (
    CheckpointManifest,
    CheckpointState,
    Layout,
    Piece,
    TensorRecord,
    check_cover,
    read_links,
    write_manifest,
)
from megagpt.checkpoint.format.shard_file import FileRecord
from megagpt.checkpoint.format.slices import Slice
from megagpt.checkpoint.owner import FolderTaken, Ownership, is_owned
from megagpt.config.schema import CheckpointConfig

logger = logging.getLogger("megagpt")


class Shard(NamedTuple):
    """What one rank has written."""

    parts: list[tuple[str, tuple[int, ...], Slice]]
    """(canonical name, shape of the whole tensor, which part of it)."""
    files: dict[str, FileRecord]
    """By name."""


class Committer:
    """Takes the folder of a run's checkpoints, or makes it, and makes steps in it; of rank 0 alone.

    Raises:
        ValueError: If a live process of this host has the folder.
        FolderTaken: If another run takes it at the same time.
        OSError: If it cannot be written.
    """

    def __init__(self, checkpoints: Path, *, layout: Layout, config: CheckpointConfig) -> None:
        self._checkpoints = checkpoints
        self._layout = layout
        self._config = config
        self._line: tuple[tuple[int, str], ...] = ()  # as in the manifest, of the next save
        checkpoints.mkdir(parents=True, exist_ok=True)
        self.owner = Ownership(checkpoints)
        try:
            self._previous = newest_sha256(checkpoints)  # as in the manifest too
            if not is_owned(checkpoints, self.owner.token):
                raise FolderTaken(f"{checkpoints} was taken by a run that started with it")
        except BaseException:
            self.owner.release()
            raise

    def follow(self, directory: Path, manifest: CheckpointManifest) -> None:
        """Goes on from a step, on whose line the next one stands if it is of the same folder."""
        with contextlib.suppress(OSError):
            if directory.parent.samefile(self._checkpoints):
                self._line = ((manifest.state.step, manifest.sha256), *manifest.line)

    def stage(self, step: int) -> None:
        """Makes room for the files of a step."""
        self.owner.require()
        remove_leftovers(self._checkpoints)
        staging_directory(step_directory(self._checkpoints, step)).mkdir()

    def commit(self, state: CheckpointState, shards: list[Shard]) -> None:
        """Makes the staged step one that counts, and removes those that retention lets go.

        Raises:
            ValueError: If the parts do not make up the tensors.
            OSError: If it cannot be written, or another run has taken the folder.
        """
        target = step_directory(self._checkpoints, state.step)
        staging = staging_directory(target)
        manifest = self._manifest(state, shards)
        self.owner.require()
        sha256 = write_manifest(staging, manifest)
        self.owner.require()
        problem: OSError | None = None
        try:
            publish(staging, target)
        except OSError as error:
            if staging.exists():
                raise
            problem = error
        self._previous, self._line = sha256, ((state.step, sha256), *manifest.line)
        try:
            self.owner.require()
            write_latest(self._checkpoints, state.step, sha256)
        except OSError as error:
            problem = error
        if problem is not None:
            raise type(problem)(f"{target} is complete, but not named or not safe yet: {problem}")
        self._remove_old_steps()

    def _manifest(self, state: CheckpointState, shards: list[Shard]) -> CheckpointManifest:
        pieces: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        files: dict[str, FileRecord] = {}
        for number, shard in enumerate(shards):
            files |= shard.files
            for name, shape, part in shard.parts:
                pieces.setdefault(name, (shape, []))[1].append(Piece(number, part))
        tensors = {name: TensorRecord(shape, tuple(all_)) for name, (shape, all_) in pieces.items()}
        check_cover(tensors)
        return CheckpointManifest(
            state=state,
            layout=self._layout,
            tensors=tensors,
            files=files,
            versions={
                "megagpt": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            previous=self._previous,
            line=tuple(each for each in self._line if not self._is_gone(*each, state.step)),
        )

    def _is_gone(self, step: int, sha256: str, next_step: int) -> bool:
        """Whether another has its place, or will have; what cannot be read now may come back."""
        directory = step_directory(self._checkpoints, step)
        links = read_links(directory)
        is_other = links is not None and links.sha256 != sha256
        return is_other or step >= next_step or not os.path.lexists(directory)

    def _remove_old_steps(self) -> None:
        """Retention; what cannot be removed is told and does not harm the save."""
        keep_last, keep_every = self._config.keep_last, self._config.keep_every
        line = dict(self._line)
        for step in steps_to_remove(list(line), keep_last=keep_last, keep_every=keep_every):
            directory = step_directory(self._checkpoints, step)
            links = read_links(directory)
            try:
                if links is not None and links.sha256 == line[step]:
                    self.owner.require()
                    remove_step(directory)
            except OSError as error:
                logger.warning(f"warning: {directory} cannot be removed ({error})")
