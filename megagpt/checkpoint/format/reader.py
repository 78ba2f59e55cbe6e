"""Reading a checkpoint: any part of any tensor, whatever layout wrote it.

Only the blocks that hold what is asked for are read, and each is compared with its hash first.
Knows no torch. Next file: `megagpt/checkpoint/loader.py`, its caller.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from megagpt.checkpoint.format.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    optimizer_file,
    read_manifest,
    tensor_key,
    weights_file,
)
from megagpt.checkpoint.format.shard_file import (
    BLOCK_BYTES,
    BlockCache,
    DamagedCheckpoint,
    FileRecord,
    ShardReader,
)
from megagpt.checkpoint.format.slices import Overlap, Slice, overlaps, whole

_MAX_OPEN_FILES = 128
_CACHE_BYTES = 512 << 20
_BAND_ELEMENTS = 16 << 20
"""Of the rows that are read at once where only some of their columns are asked for."""
_VERIFYING_THREADS = min(8, os.cpu_count() or 1)


class CheckpointReader:
    """An open checkpoint; a context manager.

    Args:
        directory: A step folder.
        held_bytes: What its caller will hold. Two blocks of each file are kept, where that is no
            more than 512 MiB or an eighth of this: many files have a little of each tensor, and
            both moments of one are asked for in turn.

    Raises:
        ValueError: If it is not a complete checkpoint; DamagedCheckpoint if it was one.
    """

    def __init__(self, directory: Path, *, held_bytes: int = 0) -> None:
        self.directory = directory
        self.manifest: CheckpointManifest = read_manifest(directory)
        two_of_each = 2 * len(self.manifest.files) * BLOCK_BYTES
        self._cache = BlockCache(min(two_of_each, max(_CACHE_BYTES, held_bytes // 8)))
        self._files: dict[str, ShardReader] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._cache.clear()

    def read_into(self, name: str, part: Slice, targets: dict[str, np.ndarray]) -> None:
        """Reads a part of a parameter.

        Args:
            name: Canonical name.
            part: Which part.
            targets: [elements of part], float32, contiguous, for each kind asked for.

        Raises:
            ValueError: If the checkpoint has no such parameter, or not all of the part.
        """
        record = self.manifest.tensors.get(name)
        if record is None:
            raise ValueError(f"{self.directory} has no {name}; it is of another model")
        found = 0
        for piece in record.meeting(part):
            for overlap in overlaps(part, piece.slice):
                found += overlap.size
                for kind, target in targets.items():
                    in_optimizer, key = tensor_key(kind, name)
                    name_of = optimizer_file if in_optimizer else weights_file
                    _read_overlap(self._file(name_of(piece.shard)), key, overlap, target)
        if found != part.size:
            raise ValueError(
                f"{self.directory} has {found} of the {part.size} elements of {name} that are "
                "asked for; it is of another model"
            )

    def tensor(self, name: str, kind: str = "weight") -> np.ndarray:
        """A whole tensor, in its shape."""
        record = self.manifest.tensors[name]
        values = np.empty(whole(record.shape).size, np.float32)
        self.read_into(name, whole(record.shape), {kind: values})
        return values.reshape(record.shape)

    def extra(self, shard: int, name: str) -> np.ndarray | None:
        """What a rank keeps beside the parameters; None if it keeps none of the name."""
        return self._file(optimizer_file(shard)).read(name)

    def _file(self, name: str) -> ShardReader:
        file = self._files.pop(name, None)
        if file is None:
            record = self.manifest.files.get(name)
            if record is None:
                raise DamagedCheckpoint(f"{self.directory}: the manifest knows no file {name}")
            if len(self._files) == _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = ShardReader(self.directory / name, record, self._cache)
        self._files[name] = file  # the one used last stands last
        return file


def _read_overlap(file: ShardReader, key: str, overlap: Overlap, target: np.ndarray) -> None:
    if overlap.is_contiguous:
        at = overlap.target_offset
        file.read_into(key, overlap.source_offset, target[at : at + overlap.size])
        return
    for band in overlap.bands(_BAND_ELEMENTS):
        begin, end = band.source_span
        span = np.empty(end - begin, np.float32)
        file.read_into(key, begin, span)
        band.copy(span, target)


def verify_checkpoint(directory: Path) -> list[str]:
    """Compares every file of a step folder with its manifest, several at a time.

    Returns:
        What is wrong, a line for each file or block; empty if all is well.
    """
    try:
        files = read_manifest(directory).files
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(_VERIFYING_THREADS) as threads:
        problems = threads.map(lambda name: _damages(directory / name, files[name]), sorted(files))
        return [problem for of_file in problems for problem in of_file]


def _damages(path: Path, record: FileRecord) -> list[str]:
    try:
        with closing(ShardReader(path, record)) as file:
            return list(file.damages())
    except (DamagedCheckpoint, OSError) as error:
        return [str(error)]


def stray_files(directory: Path, manifest: CheckpointManifest) -> list[str]:
    """Files of a step folder that its manifest does not know; nothing ever reads them."""
    known = {*manifest.files, MANIFEST_FILE}
    return sorted(path.name for path in directory.iterdir() if path.name not in known)
