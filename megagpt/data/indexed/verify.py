"""Reads a pair whole and compares it with its manifest, at the speed of memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megagpt.data.indexed.dataset import IndexedDataset, bin_path, idx_path
from megagpt.data.indexed.manifest import Manifest, manifest_path, read_manifest
from megagpt.data.indexed.writer import CHECKSUM_BLOCK_BYTES, read_blocks
from megagpt.files import file_sha256

_STEP_BYTES = 1 << 20


def verify(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Manifest | None:
    """Checks every byte of a pair.

    Without a manifest the index must be sound and every token lie in the vocabulary, if one is
    given.

    Args:
        prefix: Path of the pair without its suffix.
        vocab_size: Bound of the tokens; default: the manifest's.
        report: Called with a line for each block of .bin.

    Returns:
        The manifest, or None where there is none.

    Raises:
        ValueError: With the file, the place and what is wrong.
    """
    indexed, manifest = IndexedDataset(prefix), read_manifest(prefix)
    indexed.require_sound()
    remake = "fetch it again, or make the pair again with megagpt preprocess"
    if manifest is not None:
        _compare_counts(indexed, manifest, remake)
        if file_sha256(idx_path(prefix)) != manifest.idx_sha256:
            raise ValueError(f"{idx_path(prefix)} has changed since it was made; {remake}")
        vocab_size = manifest.vocab_size
    size = bin_path(prefix).stat().st_size
    for number, (crc32, smallest, largest) in enumerate(_blocks(indexed)):
        begin = number * CHECKSUM_BLOCK_BYTES
        end = min(begin + CHECKSUM_BLOCK_BYTES, size)
        where = f"{bin_path(prefix)} in bytes {begin} to {end}"
        if manifest is not None and crc32 != manifest.bin_crc32[number]:
            raise ValueError(f"{where} has changed since it was made; {remake}")
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            token = smallest if smallest < 0 else largest
            raise ValueError(
                f"{where} holds token {token}, which no vocabulary of {vocab_size} has; {remake}"
            )
        if report is not None:
            report(f"{where}: sound")
    return manifest


def checksums(indexed: IndexedDataset) -> tuple[tuple[int, ...], int]:
    """CRC-32 of each block of a pair's .bin, and its largest token (-1 without tokens)."""
    blocks = list(_blocks(indexed))
    return tuple(crc32 for crc32, _, _ in blocks), max((b[2] for b in blocks), default=-1)


def _blocks(indexed: IndexedDataset) -> Iterator[tuple[int, int, int]]:
    """CRC-32, smallest and largest token of each CHECKSUM_BLOCK_BYTES of .bin."""
    steps = CHECKSUM_BLOCK_BYTES // _STEP_BYTES
    crc32, smallest, largest, count = 0, 0, -1, 0
    count_items = _STEP_BYTES // indexed.dtype.itemsize
    for tokens in read_blocks(bin_path(indexed.prefix), indexed.dtype, count_items):
        crc32 = zlib.crc32(tokens.tobytes(), crc32)
        if not np.issubdtype(indexed.dtype, np.unsignedinteger):
            smallest = min(smallest, int(tokens.min()))
        largest = max(largest, int(tokens.max()))
        count += 1
        if count == steps:
            yield crc32, smallest, largest
            crc32, smallest, largest, count = 0, 0, -1, 0
    if count:
        yield crc32, smallest, largest


def _compare_counts(indexed: IndexedDataset, manifest: Manifest, remake: str) -> None:
    for name, actual in (
        ("dtype", indexed.dtype.name),
        ("num_tokens", indexed.num_tokens),
        ("num_documents", indexed.num_documents),
    ):
        said = getattr(manifest, name)
        if actual != said:
            raise ValueError(
                f"{manifest_path(indexed.prefix)} says {name}={said}, the index has {actual}; "
                f"{remake}"
            )
