"""One shard of a preprocessing job: some 16 MB of input, encoded by one process into two files.

Next files: `workers.py`, whose processes do so, and `partial_pair.py`, which joins the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.data.preprocessing.documents import (
    BadDocument,
    Part,
    read_records,
    record_text,
    split_file,
)
from megagpt.data.preprocessing.encoder import DocumentEncoder
from megagpt.data.preprocessing.faults import NO_TEXT, OnError

SHARD_BYTES = 16 << 20
_BATCH_BYTES = 1 << 20
_LISTED = 10


@dataclass(frozen=True)
class Shard:
    """What one process encodes at a time."""

    number: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its input, packed as it is."""
        return sum(part.end - part.begin for part in self.parts)


@dataclass
class PartCounts:
    """What was in one part, or so far in one file."""

    num_lines: int = 0
    num_documents: int = 0


@dataclass
class EncodedShard:
    """What a shard came to, beside its tokens and lengths."""

    number: int
    parts: list[PartCounts] = field(default_factory=list)
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, int, str]] = field(default_factory=list)
    """The first documents left out: number of the part, line in it, what is wrong."""
    error: tuple[int, int, str] | None = None
    """The same of the document that ended the shard, with on_error=fail."""


def plan_shards(files: Sequence[tuple[str, str]], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Divides files among shards: large JSONL by ranges of bytes, small files several a shard.

    Args:
        files: Path and format of each.
        shard_bytes: Size that a shard has at least, but the last.
    """
    shards: list[Shard] = []
    parts: list[Part] = []
    size = 0
    for path, file_format in files:
        for part in split_file(path, file_format, shard_bytes):
            parts.append(part)
            size += part.end - part.begin
            if size >= shard_bytes:
                shards.append(Shard(len(shards), tuple(parts)))
                parts, size = [], 0
    if parts:
        shards.append(Shard(len(shards), tuple(parts)))
    return shards


def tokens_file(directory: Path, number: int) -> Path:
    """File of a shard's tokens."""
    return directory / f"shard_{number:08d}.tokens"


def lengths_file(directory: Path, number: int) -> Path:
    """File of a shard's document lengths, int32."""
    return directory / f"shard_{number:08d}.lengths"


def encode_shard(
    shard: Shard, directory: Path, encoder: DocumentEncoder, *, json_key: str, on_error: OnError
) -> EncodedShard:
    """Encodes a shard into its two files in a folder.

    Args:
        shard: What to encode.
        directory: Where its files go.
        encoder: Of the job's tokenizer.
        json_key: Key of the text in JSONL.
        on_error: Whether a bad document ends the shard or is left out.

    Returns:
        The counts.

    Raises:
        ValueError: If a packed file is damaged.
    """
    result = EncodedShard(shard.number)
    with (
        tokens_file(directory, shard.number).open("wb") as tokens_out,
        lengths_file(directory, shard.number).open("wb") as lengths_out,
    ):
        for batch in _batches(_texts(shard, result, json_key, on_error)):
            tokens, lengths = encoder.encode(batch)
            tokens_out.write(tokens.tobytes())
            lengths_out.write(lengths.astype("<i4").tobytes())
    return result


def _texts(
    shard: Shard, result: EncodedShard, json_key: str, on_error: OnError
) -> Iterator[tuple[str, int]]:
    """Documents with text and their bytes, counted as they pass."""
    for number, part in enumerate(shard.parts):
        counts = PartCounts()
        result.parts.append(counts)
        for record in read_records(part):
            counts.num_lines += 1
            try:
                text = record_text(record, part, json_key, counts.num_lines)
            except BadDocument as fault:
                where = (number, fault.line, str(fault))
                if on_error == "fail":
                    result.error = where
                    return
                result.skipped[fault.reason] += 1
                if len(result.faults) < _LISTED:
                    result.faults.append(where)
                continue
            if not text or text.isspace():
                result.skipped[NO_TEXT] += 1
                continue
            num_bytes = len(text) if text.isascii() else len(text.encode())
            counts.num_documents += 1
            result.text_bytes += num_bytes
            yield text, num_bytes


def _batches(texts: Iterator[tuple[str, int]]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text, num_bytes in texts:
        batch.append(text)
        size += num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
