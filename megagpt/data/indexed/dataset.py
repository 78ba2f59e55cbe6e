"""Megatron's MMIDIDX pair: `<prefix>.bin` (tokens) and `<prefix>.idx` (where documents begin).

Version 1, as in Megatron-LM's megatron/core/datasets/indexed_dataset.py. Knows nothing of
tokenizers or samples. Next file: `writer.py`, which writes pairs.

.idx, little-endian: magic (9 bytes), version u64 = 1, dtype code u8, sequences S u64,
document bounds D u64 (documents + 1), lengths int32[S] in tokens, pointers int64[S] in bytes,
document_indices int64[D], where document d is sequences document_indices[d : d + 2].
"""

from __future__ import annotations

import struct
from pathlib import Path

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

REMAKE = "make the pair again with megagpt preprocess"
"""Remedy for a damaged pair."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's type for tokens of such a vocabulary: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size <= _LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: np.dtype) -> int:
    """MMIDIDX's code of a stored type.

    Raises:
        ValueError: If it has none.
    """
    if dtype not in _CODES:
        raise ValueError(
            f"dtype={dtype} cannot hold tokens in MMIDIDX; choose one of "
            f"{', '.join(str(known) for known in _CODES)}"
        )
    return _CODES[dtype]


def encode_header(dtype: np.dtype, *, num_sequences: int, num_documents: int) -> bytes:
    """What stands before the arrays of .idx."""
    return _HEADER.pack(MAGIC, VERSION, dtype_code(dtype), num_sequences, num_documents + 1)


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index of a pair."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """What a pair was made from, in a file that pairs of other trainers do not have."""
    return Path(f"{prefix}.manifest.json")


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
                    f"no data at {path}; make it with megagpt preprocess "
                    "(the demo's data: make demo)"
                )
        index_stat, tokens_stat = index_path.stat(), tokens_path.stat()
        index_bytes, tokens_bytes = index_stat.st_size, tokens_stat.st_size
        with index_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise ValueError(
                f"{index_path} is not an MMIDIDX index (its first bytes differ); {REMAKE}"
            )
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{index_path} has version {version}, readable is {VERSION}; {REMAKE}")
        if code not in _DTYPES:
            raise ValueError(
                f"{index_path} has dtype code {code}, tokens have one of "
                f"{sorted(_DTYPES)}; {REMAKE}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if index_bytes != expected or num_bounds == 0:
            raise ValueError(
                f"{index_path} holds {index_bytes} bytes, its header says {expected}; {REMAKE}"
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

        self.modified_ns = (tokens_stat.st_mtime_ns, index_stat.st_mtime_ns)
        indexed_bytes = 0
        if num_sequences:
            last_bytes = int(self.sequence_lengths[-1]) * self.dtype.itemsize
            indexed_bytes = int(self.sequence_pointers[-1]) + last_bytes
        if tokens_bytes != indexed_bytes:
            raise ValueError(
                f"{tokens_path} holds {tokens_bytes} bytes, {index_path.name} describes "
                f"{indexed_bytes}; {REMAKE}"
            )
        if self.document_indices[0] != 0 or self.document_indices[-1] != num_sequences:
            raise ValueError(
                f"{index_path} has documents over sequences {self.document_indices[0]} to "
                f"{self.document_indices[-1]} of {num_sequences}; {REMAKE}"
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
                f"damaged; {REMAKE}"
            )
        self._sound.add(documents)
