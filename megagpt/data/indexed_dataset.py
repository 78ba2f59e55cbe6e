"""Megatron's MMIDIDX pair: `<prefix>.bin` (tokens) and `<prefix>.idx` (where documents begin).

Reads and writes version 1 byte for byte as Megatron-LM does
(megatron/core/datasets/indexed_dataset.py). Knows nothing of tokenizers or samples; the next file
is `gpt_dataset.py`.

.idx, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, sequences S u64,
document bounds D u64 (documents + 1), lengths int32[S] in tokens, pointers int64[S] in bytes,
document_indices int64[D], where document d is sequences document_indices[d : d + 2].
"""

from __future__ import annotations

import array
import fcntl
import os
import struct
from collections.abc import Sequence
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


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's type for tokens of such a vocabulary: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size <= _LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index of a pair."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A read-only, memory-mapped pair of .bin and .idx.

    Opening reads the header and the last entries only; both files stay on disk until tokens are
    asked for.

    Attributes:
        prefix: Path of the pair without its suffix.
        dtype: Stored type of a token.
        num_sequences: Sequences; Megatron's writers store one or more per document.
        num_documents: Documents.
        num_tokens: Tokens of the whole pair.
        tokens: [num_tokens], dtype; all tokens back to back.
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
        index_bytes = index_path.stat().st_size
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

        tokens_bytes = tokens_path.stat().st_size
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

    def document_offsets(self) -> np.ndarray:
        """Where each document begins, in tokens: [num_documents + 1], int64, ending in num_tokens.

        Raises:
            ValueError: If sequences do not lie back to back or documents overlap, which means that
                the index is damaged.
        """
        # int64 throughout: lengths are int32 in the file and their sum passes 2**31.
        starts = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(self.sequence_lengths, dtype=np.int64, out=starts[1:])
        if (
            np.any(self.sequence_pointers != starts[:-1] * self.dtype.itemsize)
            or np.any(self.sequence_lengths < 0)
            or np.any(np.diff(self.document_indices) < 0)
        ):
            raise ValueError(
                f"{idx_path(self.prefix)} does not list its sequences back to back, so it is "
                "damaged; make the pair again with tools/preprocess_data.py"
            )
        return starts[self.document_indices]


class IndexedDatasetWriter:
    """Writes a pair: nothing appears under the final names before `finish`.

    Tokens stream to `<prefix>.bin.tmp`; memory holds 12 bytes a document. `finish` removes a stale
    .idx and manifest, renames .bin, then .idx, so that at no moment an old index describes new
    tokens. As a context manager it finishes, or on an exception removes what it wrote.

    Args:
        prefix: Path of the pair without its suffix; its folder is made.
        dtype: Stored type, see `token_dtype`.

    Raises:
        ValueError: If dtype cannot be stored or another process writes the same pair.
        OSError: If the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(
                f"dtype={self.dtype} cannot hold tokens in MMIDIDX; choose one of "
                f"{', '.join(str(known) for known in _CODES)}"
            )
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._tokens_temporary = Path(f"{bin_path(prefix)}.tmp")
        self._index_temporary = Path(f"{idx_path(prefix)}.tmp")
        self._file = self._tokens_temporary.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"{self._tokens_temporary} is being written by another process; wait for it or "
                "choose another output prefix"
            ) from error
        self._file.truncate(0)  # what a killed run left
        self._lengths = array.array("i")
        self._document_indices = array.array("q", [0])
        self._open = True

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._file.tell() // self.dtype.itemsize

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._document_indices) - 1

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Appends one document of one sequence; without tokens, a document of none, as Megatron.

        Args:
            tokens: [length], integers.

        Raises:
            ValueError: If a token does not fit the dtype.
        """
        self.add_documents(encode_tokens(tokens, self.dtype), [len(tokens)])

    def add_documents(self, encoded: bytes, lengths: Sequence[int]) -> None:
        """Appends documents whose tokens are already bytes of the dtype.

        Args:
            encoded: Their tokens back to back.
            lengths: Tokens of each.
        """
        assert sum(lengths) * self.dtype.itemsize == len(encoded), "lengths do not cover the bytes"
        self._file.write(encoded)
        for length in lengths:
            if length:
                self._lengths.append(length)
            self._document_indices.append(len(self._lengths))

    def finish(self) -> None:
        """Makes the pair appear under its names, on the disk."""
        lengths = np.asarray(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        documents = np.asarray(self._document_indices, dtype="<i8")
        header = _HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(documents))
        with self._index_temporary.open("wb") as file:
            for part in (header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()):
                file.write(part)
            _flush_to_disk(file)
        _flush_to_disk(self._file)
        idx_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.manifest.json").unlink(missing_ok=True)
        self._tokens_temporary.rename(bin_path(self.prefix))
        self._index_temporary.rename(idx_path(self.prefix))
        sync_directory(bin_path(self.prefix).parent)
        self._file.close()
        self._open = False

    def abort(self) -> None:
        """Removes what was written; an older pair of the same name stays."""
        if self._open:
            self._tokens_temporary.unlink(missing_ok=True)
            self._index_temporary.unlink(missing_ok=True)
            self._open = False
            try:
                self._file.close()
            except OSError:
                pass  # a full disk fails again here; the first error is the one to report

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


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
