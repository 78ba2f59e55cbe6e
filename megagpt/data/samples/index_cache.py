"""Sample indices kept on disk, so that the ranks of a node share one and a restart builds none.

An entry is a folder named by a hash of all that the index depends on, the content of the data among
them, and appears by a rename. So it is never stale and never half there; jobs and nodes may share
the folder, or each node have its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed.dataset import IndexedDataset, manifest_path
from megagpt.data.samples.order import SampleIndex
from megagpt.files import decode_json, file_sha256, flush_to_disk

_VERSION = 1
_TEMPORARY = ".tmp"
_LEFT_SECONDS = 24 * 3600  # what is older, a killed process left
# A smaller index is built in about the time that it takes to open one.
SMALLEST_CACHED_BYTES = 1 << 20

logger = logging.getLogger("megagpt")


def cached_index(
    directory: Path | None,
    key: dict[str, Any],
    build: Callable[[], SampleIndex],
    *,
    num_bytes: int,
) -> SampleIndex:
    """The index of a key, from disk or built; one process of a node builds, others wait.

    Args:
        directory: Folder of indices, made when it is needed; None builds every index in memory.
        key: Everything that the index depends on.
        build: Makes it.
        num_bytes: About how large it is; a small one is always built.
    """
    if directory is None or num_bytes < SMALLEST_CACHED_BYTES:
        return build()
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
    entry = directory / hashlib.sha256(text.encode()).hexdigest()[:32]
    if found := _open_entry(entry):
        return found
    try:
        with _locked(directory):
            if found := _open_entry(entry):
                return found
            index = build()
            _write_entry(entry, index, text)
            return _open_entry(entry) or index
    except OSError as error:
        logger.warning(
            "warning: %s cannot keep the sample index (%s), so each process builds its own; "
            "name a folder of this node with --data.index_cache",
            directory,
            error.strerror or error,
        )
        return build()


def pair_identity(indexed: IndexedDataset) -> dict[str, Any]:
    """What tells the content of a pair from any other at that place, without reading it."""
    manifest = manifest_path(indexed.prefix)
    return {
        "manifest": file_sha256(manifest) if manifest.is_file() else None,
        "modified_ns": indexed.modified_ns,
        "num_tokens": indexed.num_tokens,
        "num_sequences": indexed.num_sequences,
        "num_documents": indexed.num_documents,
        "dtype": indexed.dtype.name,
    }


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"*{_TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with (directory / "lock").open("w") as lock:
        # On a file system without locks several may build, and the rename decides.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_entry(entry: Path) -> SampleIndex | None:
    """An entry of the cache; None, and it is gone, where it is damaged."""
    if not entry.is_dir():
        return None
    try:
        index = SampleIndex(
            *(np.load(entry / f"{name}.npy", mmap_mode="r") for name in SampleIndex._fields)
        )
        shapes = decode_json((entry / "shapes.json").read_text())
        if shapes == _shapes(index) and all(a.dtype == np.uint32 for a in index):
            return index
        reason = "of another form"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    logger.warning("warning: the sample index %s is damaged and built anew (%s)", entry, reason)
    shutil.rmtree(entry, ignore_errors=True)
    return None


def _shapes(index: SampleIndex) -> list[list[int]]:
    return [list(array.shape) for array in index]


def _write_entry(entry: Path, index: SampleIndex, key: str) -> None:
    # A name of its own: processes of two nodes may share a number, and the folder.
    mark = f"{_TEMPORARY}_{socket.gethostname()}_{os.getpid()}"
    temporary = entry.with_name(entry.name + mark)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        (temporary / "key.json").write_text(key + "\n")
        (temporary / "shapes.json").write_text(json.dumps(_shapes(index)) + "\n")
        for name, array in index._asdict().items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                flush_to_disk(file)
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another node has built the same meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
