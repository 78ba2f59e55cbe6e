"""Megatron's MMIDIDX pair: `<prefix>.bin` (tokens) and `<prefix>.idx` (where documents begin).

Reads and writes version 1 byte for byte as Megatron-LM does
(megatron/core/datasets/indexed_dataset.py). Knows nothing of tokenizers or samples; the next file
is `gpt_dataset.py`.

.idx, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, sequences S u64,
document bounds D u64 (documents + 1), lengths int32[S] in tokens, pointers int64[S] in bytes,
document_indices int64[D], where document d is sequences document_indices[d : d + 2].
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")

# Codes 6 and 7 are floats, which no tokens are; gpt-neox even swaps them.
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_LARGEST_UINT16_VOCABULARY = 65_499
CHECKSUM_BLOCK_BYTES = 64 << 20
"""Bytes of .bin to each checksum of a manifest."""
_READ_ITEMS = 1 << 20
_INT32 = np.dtype("<i4")


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's type for tokens of such a vocabulary: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size <= _LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: np.dtype) -> int:
    """MMIDIDX's code of a stored type."""
    return _CODES[dtype]


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index of a pair."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A read-only, memory-mapped pair of .bin and .idx.

    Opening reads the header and the last entries only; both files stay on disk until tokens are
    asked for. `require_sound` reads the whole index, `verify.py` the tokens too.

    Attributes:
        prefix: Path of the pair without its suffix.
        dtype: Stored type of a token.
        num_sequences: Sequences; Megatron's writers store one or more per document.
        num_documents: Documents.
        num_tokens: Tokens of the whole pair.
        tokens: [num_tokens], dtype; all tokens back to back.
        modified_ns: When .bin and .idx were written, as the file system said on opening.
        sequence_lengths: [num_sequences], int32, in tokens.
        sequence_pointers: [num_sequences], int64, byte offsets into .bin.
        document_indices: [num_documents + 1], int64, first sequence of each document.

    Args:
        prefix: Path of the pair without its suffix.

    Raises:
        ValueError: If a file is missing, is no such index, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index_path, tokens_path = idx_path(prefix), bin_path(prefix)
        for path in (index_path, tokens_path):
            if not path.is_file():
                raise ValueError(
                    f"no data at {path}; make it with tools/preprocess_data.py "
                    "(the demo's data: make demo)"
                )
        remake = "make the pair again with tools/preprocess_data.py"
        index_stat = index_path.stat()
        index_bytes = index_stat.st_size
        with index_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise ValueError(
                f"{index_path} is not an MMIDIDX index (its first bytes differ); {remake}"
            )
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{index_path} has version {version}, readable is {VERSION}; {remake}")
        if code not in _DTYPES:
            raise ValueError(
                f"{index_path} has dtype code {code}, tokens have one of "
                f"{sorted(_DTYPES)}; {remake}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if index_bytes != expected or num_bounds == 0:
            raise ValueError(
                f"{index_path} holds {index_bytes} bytes, its header says {expected}; {remake}"
            )
        self.dtype = _DTYPES[code]
        self.num_sequences = num_sequences
        self.num_documents = num_bounds - 1
        mapped = np.memmap(index_path, dtype=np.uint8, mode="r")
        lengths_end = _HEADER.size + 4 * num_sequences
        pointers_end = lengths_end + 8 * num_sequences
        # The arrays lie unaligned in the file; numpy reads such views correctly.
        self.sequence_lengths: np.ndarray = mapped[_HEADER.size : lengths_end].view("<i4")
        self.sequence_pointers: np.ndarray = mapped[lengths_end:pointers_end].view("<i8")
        self.document_indices: np.ndarray = mapped[pointers_end:].view("<i8")

        tokens_stat = tokens_path.stat()
        tokens_bytes = tokens_stat.st_size
        self.modified_ns = (tokens_stat.st_mtime_ns, index_stat.st_mtime_ns)
        indexed_bytes = 0
        if num_sequences:
            last_bytes = int(self.sequence_lengths[-1]) * self.dtype.itemsize
            indexed_bytes = int(self.sequence_pointers[-1]) + last_bytes
        if tokens_bytes != indexed_bytes:
            raise ValueError(
                f"{tokens_path} holds {tokens_bytes} bytes, {index_path.name} describes "
                f"{indexed_bytes}; {remake}"
            )
        if self.document_indices[0] != 0 or self.document_indices[-1] != num_sequences:
            raise ValueError(
                f"{index_path} has documents over sequences {self.document_indices[0]} to "
                f"{self.document_indices[-1]} of {num_sequences}; {remake}"
            )
        self.num_tokens = tokens_bytes // self.dtype.itemsize
        self.tokens: np.ndarray = (
            np.memmap(tokens_path, dtype=self.dtype, mode="r")
            if tokens_bytes  # an empty file cannot be mapped
            else np.empty(0, dtype=self.dtype)
        )
        self._sound: set[range] = set()
        # For the compiled reader; the arrays above keep the memory.
        self.tokens_address: int = self.tokens.ctypes.data
        self.lengths_address: int = self.sequence_lengths.ctypes.data
        self.pointers_address: int = self.sequence_pointers.ctypes.data

    def __len__(self) -> int:
        """Number of sequences, as in Megatron."""
        return self.num_sequences

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence: [length], stored dtype, a view of the file."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences} in {self.prefix}")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, all its sequences: [length], stored dtype."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        first, last = (int(bound) for bound in self.document_indices[index : index + 2])
        parts = [self[sequence] for sequence in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def sequence_bounds(self, first_document: int, last_document: int) -> tuple[int, int]:
        """First and last sequence (exclusive) of a range of documents."""
        bounds = self.document_indices[[first_document, last_document]]
        return int(bounds[0]), int(bounds[1])

    def num_tokens_between(self, first_sequence: int, last_sequence: int) -> int:
        """Tokens of a range of sequences, which lie back to back; the last is exclusive."""
        pointers = [
            int(self.sequence_pointers[sequence])
            if sequence < self.num_sequences
            else self.num_tokens * self.dtype.itemsize
            for sequence in (first_sequence, last_sequence)
        ]
        return (pointers[1] - pointers[0]) // self.dtype.itemsize

    def document_offsets(self) -> np.ndarray:
        """Where each document begins, in tokens: [num_documents + 1], int64, ending in num_tokens.

        Raises:
            ValueError: If the index is damaged.
        """
        self.require_sound()
        ends = np.array([self.num_tokens * self.dtype.itemsize])
        pointers = np.concatenate([self.sequence_pointers, ends])
        return pointers[self.document_indices] // self.dtype.itemsize

    def require_sound(self, documents: range | None = None) -> None:
        """Reads the index of a range of documents once; default: all of it.

        Raises:
            ValueError: If sequences do not lie back to back or documents overlap, which means that
                the index is damaged.
        """
        documents = documents if documents is not None else range(self.num_documents)
        if documents in self._sound:
            return
        bounds = self.document_indices[documents.start : documents.stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        sound = 0 <= first and last <= self.num_sequences and not np.any(bounds[1:] < bounds[:-1])
        if sound and last > first:
            lengths = self.sequence_lengths[first:last]
            # int64: lengths are int32 in the file and their sum passes 2**31.
            pointers = np.cumsum(lengths, dtype=np.int64)
            pointers *= self.dtype.itemsize
            pointers += self.sequence_pointers[first] if first else 0
            following = self.sequence_pointers[first + 1 : last + 1]
            sound = np.array_equal(following, pointers[: len(following)]) and lengths.min() >= 0
        if not sound:
            raise ValueError(
                f"{idx_path(self.prefix)} does not list its sequences back to back, so it is "
                "damaged; make the pair again with tools/preprocess_data.py"
            )
        self._sound.add(documents)


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
    """Writes a pair: nothing appears under the final names before `finish`.

    All goes to the folder `<prefix>.partial` first, lengths too, so memory does not grow with the
    corpus. `finish` removes a stale .idx and manifest, renames .bin, then .idx, so that at no
    moment an old index describes new tokens. As a context manager it finishes, or on an exception
    removes what it wrote.

    Attributes:
        prefix: Path of the pair without its suffix.
        dtype: Stored type of a token.
        directory: The folder of what is being written.
        num_tokens: Tokens written so far.
        num_documents: Documents written so far.
        largest_token: Largest token so far; -1 before the first.
        bin_crc32: CRC-32 of each full CHECKSUM_BLOCK_BYTES of .bin; after `finish`, of all.
        idx_sha256: Hash of .idx, set by `finish`.

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
        if self.dtype not in _CODES:
            raise ValueError(
                f"dtype={self.dtype} cannot hold tokens in MMIDIDX; choose one of "
                f"{', '.join(str(known) for known in _CODES)}"
            )
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
            _flush_to_disk(file)

    def finish(self) -> None:
        """Makes the pair appear under its names, on the disk."""
        self.flush()
        if self.num_tokens * self.dtype.itemsize % CHECKSUM_BLOCK_BYTES:
            self.bin_crc32.append(self._crc32)
        index = self.directory / "index"
        digest = hashlib.sha256()
        with index.open("wb") as file:
            for part in self._index_parts():
                file.write(part)
                digest.update(part)
            _flush_to_disk(file)
        self.idx_sha256 = digest.hexdigest()
        idx_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.manifest.json").unlink(missing_ok=True)
        (self.directory / "tokens").rename(bin_path(self.prefix))
        index.rename(idx_path(self.prefix))
        sync_directory(self.directory.parent)
        self.abort()

    def _index_parts(self) -> Iterator[bytes]:
        """The content of .idx, some megabytes at a time."""
        header = (VERSION, _CODES[self.dtype], self._num_sequences, self.num_documents + 1)
        yield _HEADER.pack(MAGIC, *header)
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
            try:
                file.close()
            except OSError:
                pass  # a full disk fails again here; the first error is the one to report

    def abort(self) -> None:
        """Removes the folder of what was being written; an older pair of the name stays."""
        if self._open:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.close()

    def __enter__(self) -> IndexedDatasetWriter:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes, or after any failure removes what was written."""
        try:
            if kind is None:
                self.finish()
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


def sync_directory(directory: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_blocks(path: Path, dtype: np.dtype, num_items: int) -> Iterator[np.ndarray]:
    """The numbers of a file, num_items at a time."""
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, dtype=dtype, count=num_items)):
            yield numbers


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
