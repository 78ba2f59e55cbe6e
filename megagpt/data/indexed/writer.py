"""Writes MMIDIDX pairs: in a folder of their own, and whole before they appear.

Next file: `manifest.py`, whose `publish_pair` adds the manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.data.indexed.dataset import (
    bin_path,
    dtype_code,
    encode_header,
    idx_path,
    manifest_path,
)
from megagpt.files import flush_to_disk, sync_directory, write_atomically

CHECKSUM_BLOCK_BYTES = 64 << 20
"""Bytes of .bin to each checksum of a manifest."""
_READ_ITEMS = 1 << 20
_INT32 = np.dtype("<i4")


@dataclass(frozen=True)
class WriterState:
    """How far a writer is."""

    num_tokens: int = 0
    num_sequences: int = 0
    num_documents: int = 0
    largest_token: int = -1
    crc32: int = 0
    """Of the block of .bin that is not full yet."""
    num_blocks: int = 0
    """Full blocks."""


class IndexedDatasetWriter:
    """Writes a pair: nothing appears under the final names before `publish`.

    All goes to the folder `<prefix>.partial` first, lengths too, so memory does not grow with the
    corpus. `publish` removes a stale .idx and manifest before it renames .bin, so that at no moment
    an old index describes new tokens. As a context manager it seals and publishes, if that was
    not done inside, or on an exception removes what it wrote.

    Attributes:
        prefix: Path of the pair without its suffix.
        dtype: Stored type of a token.
        directory: The folder of what is being written.
        num_tokens: Tokens written so far.
        num_documents: Documents written so far.
        largest_token: Largest token so far; -1 before the first.
        bin_crc32: CRC-32 of each full CHECKSUM_BLOCK_BYTES of .bin; after `seal`, of all.
        idx_sha256: Hash of .idx, set by `seal`.
        idx_bytes: Size of .idx, set by `seal`.

    Args:
        prefix: Path of the pair without its suffix; its folder is made.
        dtype: Stored type, see `token_dtype`.
        resume: Leave what a killed writer left, to `rewind` to a state of it before adding more.

    Raises:
        ValueError: If dtype cannot be stored or another process writes the same pair.
        OSError: If the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, *, resume: bool = False) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        dtype_code(self.dtype)  # refuses what has none
        self.directory = Path(f"{prefix}.partial")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{self.directory} is being written by another process; wait for it or "
                "choose another output prefix"
            ) from error
        self._tokens = (self.directory / "tokens").open("ab")
        self._lengths = (self.directory / "lengths").open("ab")
        self._counts = (self.directory / "counts").open("ab")
        self._open = True
        if resume:
            self._go_to(WriterState(), [])
        else:
            self.rewind(WriterState())

    @property
    def state(self) -> WriterState:
        """Where the writer is, to `rewind` to."""
        return WriterState(
            num_tokens=self.num_tokens,
            num_sequences=self._num_sequences,
            num_documents=self.num_documents,
            largest_token=self.largest_token,
            crc32=self._crc32,
            num_blocks=len(self.bin_crc32),
        )

    def rewind(self, state: WriterState, bin_crc32: Sequence[int] = ()) -> None:
        """Goes back to an earlier state of this or of a killed writer, whose files are here.

        Args:
            state: The earlier state.
            bin_crc32: Checksums of its full blocks.

        Raises:
            ValueError: If less was written than it says.
        """
        self._go_to(state, list(bin_crc32))
        for file, size in (
            (self._tokens, state.num_tokens * self.dtype.itemsize),
            (self._lengths, state.num_sequences * 4),
            (self._counts, state.num_documents * 4),
        ):
            file.flush()
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(
                    f"{file.name} is shorter than its journal says; remove {self.directory} and "
                    "start again"
                )
            file.truncate(size)

    def _go_to(self, state: WriterState, bin_crc32: list[int]) -> None:
        assert len(bin_crc32) == state.num_blocks, "one checksum a full block"
        self.num_tokens = state.num_tokens
        self._num_sequences = state.num_sequences
        self.num_documents = state.num_documents
        self.largest_token = state.largest_token
        self._crc32 = state.crc32
        self.bin_crc32 = bin_crc32

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Appends one document of one sequence; without tokens, a document of none, as Megatron.

        Args:
            tokens: [length], integers.

        Raises:
            ValueError: If a token does not fit the dtype.
        """
        encoded = np.frombuffer(encode_tokens(tokens, self.dtype), dtype=self.dtype)
        self.add_documents(encoded, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents of one sequence each.

        Args:
            tokens: Their tokens back to back, of the dtype.
            lengths: [d], tokens of each.
        """
        self.add_tokens(tokens)
        self.add_lengths(lengths[lengths > 0], lengths > 0)

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Appends tokens of the dtype; `add_lengths` says whose they are."""
        assert tokens.dtype == self.dtype, f"{tokens.dtype} instead of {self.dtype}"
        if not len(tokens):
            return
        self.largest_token = max(self.largest_token, int(tokens.max()))
        content = memoryview(tokens.tobytes())
        self._tokens.write(content)
        written = self.num_tokens * self.dtype.itemsize
        while content:
            room = CHECKSUM_BLOCK_BYTES - written % CHECKSUM_BLOCK_BYTES
            self._crc32 = zlib.crc32(content[:room], self._crc32)
            written += len(content[:room])
            content = content[room:]
            if written % CHECKSUM_BLOCK_BYTES == 0:
                self.bin_crc32.append(self._crc32)
                self._crc32 = 0
        self.num_tokens += len(tokens)

    def add_lengths(self, lengths: np.ndarray, counts: np.ndarray) -> None:
        """Says of tokens how they are divided.

        Args:
            lengths: [sequences], tokens of each sequence.
            counts: [documents], sequences of each document.
        """
        self._lengths.write(lengths.astype(_INT32).tobytes())
        self._counts.write(counts.astype(_INT32).tobytes())
        self._num_sequences += len(lengths)
        self.num_documents += len(counts)

    def flush(self) -> None:
        """Puts all that was added on the disk."""
        for file in (self._tokens, self._lengths, self._counts):
            flush_to_disk(file)

    def seal(self) -> None:
        """Completes the pair in its folder: index, hash and checksums; nothing is added after."""
        self.flush()
        if self.num_tokens * self.dtype.itemsize % CHECKSUM_BLOCK_BYTES:
            self.bin_crc32.append(self._crc32)
        digest = hashlib.sha256()
        self.idx_bytes = 0
        with (self.directory / "index").open("wb") as file:
            for part in self._index_parts():
                file.write(part)
                digest.update(part)
                self.idx_bytes += len(part)
            flush_to_disk(file)
        self.idx_sha256 = digest.hexdigest()

    def publish(self, sidecar: bytes | None = None) -> None:
        """Makes the sealed pair appear under its names, on the disk.

        The index comes last: without it nothing opens, and with it all is there.

        Args:
            sidecar: Content of the manifest; None leaves the pair without one.
        """
        manifest = manifest_path(self.prefix)
        idx_path(self.prefix).unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
        (self.directory / "tokens").rename(bin_path(self.prefix))
        if sidecar is not None:
            write_atomically(manifest, sidecar)
        (self.directory / "index").rename(idx_path(self.prefix))
        sync_directory(self.directory.parent)
        self.abort()

    def _index_parts(self) -> Iterator[bytes]:
        """The content of .idx, some megabytes at a time."""
        yield encode_header(
            self.dtype, num_sequences=self._num_sequences, num_documents=self.num_documents
        )
        for lengths in read_blocks(self.directory / "lengths", _INT32, _READ_ITEMS):
            yield lengths.tobytes()
        pointer = 0
        for lengths in read_blocks(self.directory / "lengths", _INT32, _READ_ITEMS):
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + pointer
            yield np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes()
            pointer = int(ends[-1])
        assert pointer == self.num_tokens * self.dtype.itemsize, "lengths do not cover the tokens"
        yield np.zeros(1, dtype="<i8").tobytes()
        first = 0
        for counts in read_blocks(self.directory / "counts", _INT32, _READ_ITEMS):
            bounds = np.cumsum(counts, dtype=np.int64) + first
            yield bounds.astype("<i8").tobytes()
            first = int(bounds[-1])

    def close(self) -> None:
        """Leaves the folder as it is, for a later writer to go on from."""
        if not self._open:
            return
        self._open = False
        for file in (self._tokens, self._lengths, self._counts, self._lock):
            # A full disk fails again here; the first error is the one to report.
            with contextlib.suppress(OSError):
                file.close()

    def abort(self) -> None:
        """Removes the folder of what was being written; an older pair of the name stays."""
        if self._open:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.close()

    def __enter__(self) -> IndexedDatasetWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Seals and publishes, or after any failure removes what was written."""
        try:
            if kind is None and self._open:
                self.seal()
                self.publish()
        finally:
            self.abort()


def encode_tokens(tokens: Sequence[int] | np.ndarray, dtype: np.dtype) -> bytes:
    """Tokens as bytes of the stored type.

    Raises:
        ValueError: If one does not fit.
    """
    values = np.asarray(tokens, dtype=np.int64)
    limits = np.iinfo(dtype)
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        worst = values.max() if values.max() > limits.max else values.min()
        raise ValueError(
            f"token {worst} does not fit {dtype} "
            f"({limits.min} to {limits.max}); write with the dtype of the tokenizer's vocabulary"
        )
    return values.astype(dtype).tobytes()


def read_blocks(path: Path, dtype: np.dtype, num_items: int) -> Iterator[np.ndarray]:
    """The numbers of a file, num_items at a time."""
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, dtype=dtype, count=num_items)):
            yield numbers
