"""What rank 0 does of a save: it makes a step of what all ranks have written, and removes old ones.

The folder is the run's own before each change, or nothing is changed. Next file: `directory.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import zlib
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import deepspeed
import numpy as np
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
    check_cover,
    read_links,
    write_manifest,
)
from megagpt.checkpoint.format.pieces import ROWS, TensorRecord, records_of
from megagpt.checkpoint.format.shard_file import FileRecord
from megagpt.checkpoint.format.slices import Slice
from megagpt.checkpoint.owner import FolderTaken, Ownership, is_owned
from megagpt.config.schema import CheckpointConfig
from megagpt.files import decode_json

logger = logging.getLogger("megagpt")


class Shard(NamedTuple):
    """What one rank has written, as small as it goes: rank 0 gets it from every rank."""

    tensors: bytes
    """Compressed JSON: name and shape of the whole tensor, of each part; mostly the same for all
    ranks."""
    slices: bytes
    """Compressed array [parts, 6] of int64: rows, columns, start and end."""
    files: dict[str, FileRecord]
    """By name."""

    @staticmethod
    def of(
        parts: Iterable[tuple[str, tuple[int, ...], Slice]], files: dict[str, FileRecord]
    ) -> Shard:
        """Of (canonical name, shape of the whole tensor, which part of it) and the files."""
        parts = list(parts)
        tensors = json.dumps([[name, shape] for name, shape, _ in parts]).encode()
        rows = [(*part.rows, *part.columns, part.start, part.end) for _, _, part in parts]
        slices = np.array(rows, dtype=np.int64).tobytes()
        return Shard(zlib.compress(tensors, 1), zlib.compress(slices, 1), files)


def tensors_of(shards: Iterable[Shard]) -> dict[str, TensorRecord]:
    """What shards hold together, by name; not yet checked for being whole."""
    alike: dict[bytes, list[tuple[int, bytes]]] = {}  # (number, slices) by the list of tensors
    for number, shard in enumerate(shards):
        alike.setdefault(shard.tensors, []).append((number, zlib.decompress(shard.slices)))
    places: dict[str, int] = {}
    shapes: list[tuple[int, ...]] = []
    tables = []
    for compressed, own in alike.items():
        tensors = []
        for name, shape in decode_json(zlib.decompress(compressed)):
            if name not in places:
                places[name] = len(shapes)
                shapes.append(tuple(shape))
            tensors.append(places[name])
        slices = np.frombuffer(b"".join(each for _, each in own), dtype=np.int64)
        slices = slices.reshape(len(own), len(tensors), 6)
        # By tensor, then by shard: under ZeRO-3, where all have the same list, it is sorted so.
        table = np.empty((len(ROWS), len(tensors), len(own)), dtype=np.int64)
        table[0] = np.array(tensors, dtype=np.int64)[:, None]
        table[1:-1] = slices.transpose(2, 1, 0)
        table[-1] = [number for number, _ in own]
        tables.append(table.reshape(len(ROWS), -1))
    return dict(zip(places, records_of(shapes, np.concatenate(tables, axis=1)), strict=True))


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
        files: dict[str, FileRecord] = {}
        for shard in shards:
            files |= shard.files
        tensors = tensors_of(shards)
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
