"""One shard of a preprocessing job: some 16 MB of input, encoded by one process into two files.

Next files: `workers.py`, whose processes do so, and `partial_pair.py`, which joins the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megagpt.data.preprocessing.documents import (
    BadDocument,
    Part,
    read_records,
    record_text,
    split_file,
)
from megagpt.data.preprocessing.encoder import DocumentEncoder

OnError = Literal["fail", "skip"]
"""What a document that cannot be encoded does: end the job, or be left out and counted."""
NO_TEXT = "no text"
"""Reason of an empty document, which is no fault."""
SHARD_BYTES = 16 << 20
_BATCH_BYTES = 1 << 20
_LISTED = 10


@dataclass(frozen=True)
class EncodingJob:
    """What every process that encodes must know."""

    directory: Path
    """Where the files of shards go."""
    tokenizer_path: str
    slow_reason: str | None
    """Why the compiled encoder is left out, see `DocumentEncoder`."""
    json_key: str
    on_error: OnError


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


def shard_files(directory: Path, number: int) -> tuple[Path, Path]:
    """Files of a shard's tokens, and of its document lengths, int32."""
    name = f"shard_{number:08d}"
    return directory / f"{name}.tokens", directory / f"{name}.lengths"


def encode_shard(job: EncodingJob, shard: Shard, encoder: DocumentEncoder) -> EncodedShard:
    """Encodes a shard into its two files in the job's folder, and counts.

    Raises:
        ValueError: If a packed file is damaged.
    """
    result = EncodedShard(shard.number)
    tokens_file, lengths_file = shard_files(job.directory, shard.number)
    with tokens_file.open("wb") as tokens_out, lengths_file.open("wb") as lengths_out:
        for batch in _batches(_texts(job, shard, result)):
            tokens, lengths = encoder.encode(batch)
            tokens_out.write(tokens.tobytes())
            lengths_out.write(lengths.astype("<i4").tobytes())
    return result


def _texts(job: EncodingJob, shard: Shard, result: EncodedShard) -> Iterator[tuple[str, int]]:
    """Documents with text and their bytes, counted as they pass."""
    for number, part in enumerate(shard.parts):
        counts = PartCounts()
        result.parts.append(counts)
        for record in read_records(part):
            counts.num_lines += 1
            try:
                text = record_text(record, part, job.json_key)
            except BadDocument as fault:
                where = (number, counts.num_lines - 1 + fault.line, str(fault))
                if job.on_error == "fail":
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
