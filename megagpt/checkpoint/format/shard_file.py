"""One safetensors file, written and read in blocks that each have a hash.

The format is safetensors' own, which any reader of it opens; the hashes stand in the manifest. A
block is compared with its hash before anything of it is used. Knows nothing of layouts.
Next file: `manifest.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megagpt.files import decode_json

BLOCK_BYTES = 8 << 20
HASHES: dict[str, Callable[..., Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""The first is what files are written with: it finds damage at the speed of memory, on any CPU.

SHA-256 is that of checkpoints of before. Neither keeps anyone from changing a file on purpose, who
could change the manifest with it.
"""
_WRITTEN = next(iter(HASHES))
_HASH_KEYS = {f"block_{name}": name for name in HASHES}

_DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file to an error of a call that knows only its descriptor."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class FileRecord(NamedTuple):
    """What the manifest keeps of a file."""

    num_bytes: int
    """Its length."""
    block_hashes: tuple[str, ...]
    """Hash of each block of BLOCK_BYTES, in hex."""
    hash_name: str = _WRITTEN
    """Which hash, of HASHES."""


class FileTable(Mapping[str, FileRecord]):
    """Records by name, made when one is asked for: of many files a rank reads a few.

    Args:
        entries: As they stand in a manifest.

    Raises:
        KeyError, TypeError: If they hold what no writer makes.
    """

    def __init__(self, entries: dict[str, dict[str, Any]]) -> None:
        self._entries = entries
        if "/" in "".join(entries) or entries.keys() & {"", ".", ".."}:
            raise KeyError("what is not the name of a file")
        sizes = [entry["bytes"] for entry in entries.values()]
        if set(map(type, sizes)) - {int} or min(sizes, default=0) < 0:
            raise TypeError("a length that is not a whole number")
        first, other = _HASH_KEYS
        hashes = [entry.get(first, entry.get(other)) for entry in entries.values()]
        if set(map(type, hashes)) - {list}:
            raise KeyError("hashes of blocks")

    def __getitem__(self, name: str) -> FileRecord:
        entry = self._entries[name]
        key = next(key for key in _HASH_KEYS if key in entry)
        return FileRecord(entry["bytes"], tuple(entry[key]), _HASH_KEYS[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], **more: Any
) -> bytes:
    """What a file begins with.

    Args:
        tensors: (type in safetensors' words, shape, bytes) by name, in the order of the file.
        more: Further entries, which stand first.
    """
    header, offset = more, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the tensors of a file in the order of its header.

    Args:
        path: Must not exist.
        tensors: Shape and type by name, in the order in which they will be written.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.path = path
        self._digests: list[str] = []
        self._hash = HASHES[_WRITTEN]()
        self._num_bytes = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        entries = {
            name: (_NAMES[dtype], shape, dtype.itemsize * math.prod(shape))
            for name, (shape, dtype) in tensors.items()
        }
        try:
            self._write(memoryview(safetensors_header(entries)))
        except BaseException:
            self.abandon()
            raise
        self._expected_bytes = self._num_bytes + sum(size for *_, size in entries.values())

    def write(self, values: np.ndarray) -> None:
        """Appends a tensor or a part of one; its memory may change when this returns."""
        self._write(np.ascontiguousarray(values).data.cast("B"))

    def _write(self, data: memoryview) -> None:
        while data:
            room = BLOCK_BYTES - self._num_bytes % BLOCK_BYTES
            part, data = data[:room], data[room:]
            self._hash.update(part)
            self._num_bytes += len(part)
            if len(part) == room:
                self._digests.append(self._hash.hexdigest())
                self._hash = HASHES[_WRITTEN]()
            while part:
                with _naming(self.path):
                    written = os.write(self._descriptor, part)
                if not written:
                    raise OSError(errno.EIO, "nothing was written", str(self.path))
                part = part[written:]

    def close(self) -> FileRecord:
        """Makes the file durable."""
        assert self._num_bytes == self._expected_bytes, "the header promised other tensors"
        if self._num_bytes % BLOCK_BYTES:
            self._digests.append(self._hash.hexdigest())
        try:
            with _naming(self.path):
                os.fsync(self._descriptor)
            found = os.fstat(self._descriptor).st_size
        finally:
            self.abandon()
        if found != self._num_bytes:
            message = f"{found:,} of {self._num_bytes:,} bytes arrived"
            raise OSError(errno.EIO, message, str(self.path))
        return FileRecord(self._num_bytes, tuple(self._digests))

    def abandon(self) -> None:
        """Closes the file, if that is not done yet."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class BlockCache:
    """The blocks that were read last, of any file: small tensors stand many to a block.

    One is kept even where it is more than `max_bytes`.
    """

    def __init__(self, max_bytes: int = BLOCK_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._blocks: dict[tuple[Path, int], memoryview] = {}  # the one used last stands last

    def block(self, key: tuple[Path, int], read: Callable[[int], memoryview]) -> memoryview:
        """A block of a file, by its path and number; read where it is not at hand."""
        found = self._blocks.pop(key, None)
        if found is None:
            found = read(key[1])
            self._num_bytes += len(found)
        self._blocks[key] = found
        while self._num_bytes > self._max_bytes and len(self._blocks) > 1:
            self._num_bytes -= len(self._blocks.pop(next(iter(self._blocks))))
        return found

    def clear(self) -> None:
        """Forgets them."""
        self._blocks.clear()
        self._num_bytes = 0


class ShardReader:
    """Reads verified parts of a file; the cache may hold blocks of other files too.

    Raises:
        DamagedCheckpoint: If it is missing, or has another length.
    """

    def __init__(self, path: Path, record: FileRecord, cache: BlockCache | None = None) -> None:
        self.path = path
        self.record = record
        self._cache = cache or BlockCache()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing") from None
        try:
            found = os.fstat(self._descriptor).st_size
            if found != record.num_bytes:
                raise DamagedCheckpoint(
                    f"{path} has {found:,} bytes, its manifest says {record.num_bytes:,}"
                )
            if len(record.block_hashes) != -(-record.num_bytes // BLOCK_BYTES):
                raise DamagedCheckpoint(f"{path}: its manifest has not a hash for every block")
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def read_into(self, name: str, first: int, target: np.ndarray) -> None:
        """Reads consecutive elements of a tensor.

        Args:
            name: Of the tensor.
            first: Its first element to read, in flat order.
            target: [elements], contiguous, of the tensor's type.

        Raises:
            DamagedCheckpoint: If there is none, or a block is not the one that was written.
        """
        if name not in self._tensors:
            raise DamagedCheckpoint(f"{self.path} has no tensor {name}")
        begin, end, dtype = self._tensors[name]
        assert target.flags.c_contiguous
        if target.dtype != dtype:
            raise DamagedCheckpoint(f"{self.path}: {name} is of another type than asked for")
        begin += first * dtype.itemsize
        if begin + target.nbytes > end:
            raise DamagedCheckpoint(f"{self.path}: {name} is shorter than its manifest says")
        self._read_verified(begin, target.data.cast("B"))

    def read(self, name: str) -> np.ndarray | None:
        """A whole tensor, flat; None if the file has none of the name."""
        if name not in self._tensors:
            return None
        begin, end, dtype = self._tensors[name]
        values = np.empty((end - begin) // dtype.itemsize, dtype)
        self.read_into(name, 0, values)
        return values

    def damages(self) -> Iterator[str]:
        """Reads every block and tells which are not those that were written."""
        for number in range(len(self.record.block_hashes)):
            try:
                self._read_block(number)
            except DamagedCheckpoint as error:
                yield str(error)

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, int, np.dtype]]:
        """Where each tensor stands, and its type; the header is read on first use."""
        if self.record.num_bytes < 8:
            raise DamagedCheckpoint(f"{self.path} is not a safetensors file")
        size = bytearray(8)
        self._read_verified(0, memoryview(size))
        length = int.from_bytes(size, "little")
        if 8 + length > self.record.num_bytes:
            raise DamagedCheckpoint(f"{self.path} is not a safetensors file")
        text = bytearray(length)
        self._read_verified(8, memoryview(text))
        tensors: dict[str, tuple[int, int, np.dtype]] = {}
        try:
            for name, entry in decode_json(bytes(text)).items():
                begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                if not 0 <= begin <= end <= self.record.num_bytes:
                    raise ValueError(f"{name} lies outside of the file")
                tensors[name] = (begin, end, _DTYPES[entry["dtype"]])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise DamagedCheckpoint(f"{self.path} is not a safetensors file") from None
        return tensors

    def _read_verified(self, begin: int, target: memoryview) -> None:
        """Fills target from the file, whole blocks without a copy."""
        done = 0
        while done < len(target):
            number, offset = divmod(begin + done, BLOCK_BYTES)
            size = min(BLOCK_BYTES, self.record.num_bytes - number * BLOCK_BYTES)
            take = min(size - offset, len(target) - done)
            into = target[done : done + take]
            if take == size:
                self._read_and_compare(number, into)
            else:
                block = self._cache.block((self.path, number), self._read_block)
                into[:] = block[offset : offset + take]
            done += take

    def _read_block(self, number: int) -> memoryview:
        size = min(BLOCK_BYTES, self.record.num_bytes - number * BLOCK_BYTES)
        block = memoryview(bytearray(size))
        self._read_and_compare(number, block)
        return block

    def _read_and_compare(self, number: int, target: memoryview) -> None:
        position, done = number * BLOCK_BYTES, 0
        while done < len(target):
            with _naming(self.path):
                got = os.preadv(self._descriptor, [target[done:]], position + done)
            if not got:
                raise DamagedCheckpoint(f"{self.path} ends early, at byte {position + done:,}")
            done += got
        digest = HASHES[self.record.hash_name](target).hexdigest()
        if digest != self.record.block_hashes[number]:
            raise DamagedCheckpoint(
                f"{self.path} is damaged: bytes {position:,} to {position + len(target):,} are not "
                "those that were written"
            )
