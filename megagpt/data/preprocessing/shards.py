"""One shard of a preprocessing job: some 16 MB of input, encoded by one process into two files.

Next files: `workers.py`, whose processes do so, and `partial_pair.py`, which joins the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megagpt.data.preprocessing.documents import (
    BadDocument,
    Part,
    read_records,
    record_text,
    split_file,
)
from megagpt.data.preprocessing.encoder import DocumentEncoder
from megagpt.data.preprocessing.fidelity import lost

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
    eod: int
    """What ends documents."""
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
    lost_bytes: int = 0
    altered_documents: int = 0
    unknown_tokens: int = 0
    """These three as in `Fidelity`."""
    places: list[tuple[int, int, str]] = field(default_factory=list)
    """The first documents that do not come back exactly, and what is missing there."""
    error: tuple[int, int, str] | None = None
    """The same of the document that ended the shard, with on_error=fail."""

    def leave_out(self, reason: str, where: tuple[int, int, str]) -> None:
        """Counts a document that is left out, and keeps the first ones."""
        self.skipped[reason] += 1
        if len(self.faults) < _LISTED:
            self.faults.append(where)


class _Document(NamedTuple):
    text: str
    num_bytes: int
    part: int
    """Number of its part in the shard."""
    line: int
    """In the part, from 1."""


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
            encoded = _encoded(job, batch, encoder, result)
            if encoded is None:
                break
            documents, tokens, lengths = encoded
            _measure(documents, tokens, lengths, encoder, result)
            tokens_out.write(tokens.tobytes())
            lengths_out.write(lengths.astype("<i4").tobytes())
    return result


def _encoded(
    job: EncodingJob, batch: list[_Document], encoder: DocumentEncoder, result: EncodedShard
) -> tuple[list[_Document], np.ndarray, np.ndarray] | None:
    """What is encoded, its tokens and lengths; None ends the job.

    What the tokenizer cannot encode is a bad document.
    """
    try:
        return batch, *encoder.encode([document.text for document in batch])
    except ValueError:  # of one of them
        pass
    good = []
    for document in batch:
        try:
            encoder.encode([document.text])
            good.append(document)
        except ValueError as fault:
            where = (document.part, document.line, str(fault))
            if job.on_error == "fail":
                result.error = where
                return None
            result.leave_out("not encodable", where)
            result.text_bytes -= document.num_bytes
            result.parts[document.part].num_documents -= 1
    return good, *encoder.encode([document.text for document in good])


def _measure(
    documents: list[_Document],
    tokens: np.ndarray,
    lengths: np.ndarray,
    encoder: DocumentEncoder,
    result: EncodedShard,
) -> None:
    """Counts what the tokens do not give back."""
    tokenizer = encoder.tokenizer
    if tokenizer.unknown is not None:
        result.unknown_tokens += int((tokens == tokenizer.unknown).sum())
    ends = np.cumsum(lengths)
    for document, end, length in zip(documents, ends, lengths, strict=True):
        if encoder.is_exact(document.text):
            continue
        decoded = tokenizer.decode(tokens[end - length : end - 1].tolist())
        if decoded == document.text:
            continue
        num_bytes, missing = lost(document.text, decoded)
        result.altered_documents += 1
        result.lost_bytes += num_bytes
        if len(result.places) < _LISTED:
            what = f"without {missing!r}" if missing else "other spaces or order"
            result.places.append((document.part, document.line, what))


def _texts(job: EncodingJob, shard: Shard, result: EncodedShard) -> Iterator[_Document]:
    """Documents with text, counted as they pass."""
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
                result.leave_out(fault.reason, where)
                continue
            if not text or text.isspace():
                result.skipped[NO_TEXT] += 1
                continue
            num_bytes = len(text) if text.isascii() else len(text.encode())
            counts.num_documents += 1
            result.text_bytes += num_bytes
            yield _Document(text, num_bytes, number, counts.num_lines)


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
