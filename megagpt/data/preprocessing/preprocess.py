"""JSONL or plain text to a .bin/.idx pair with its manifest.

The input is divided into shards. Workers encode them; the parent appends them in order to the files
of `<prefix>.partial` and notes each in a journal there, so that the same command goes on after an
interruption. Memory does not grow with the corpus. Imports no torch, so that the command starts at
once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed.dataset import token_dtype
from megagpt.data.indexed.manifest import Manifest, Source, publish_pair, tokenizer_facts
from megagpt.data.indexed.writer import IndexedDatasetWriter, WriterState, read_blocks
from megagpt.data.preprocessing.documents import (
    BadDocument,
    Part,
    expand_inputs,
    read_records,
    record_text,
    resolve_format,
)
from megagpt.data.preprocessing.encoder import DocumentEncoder, compare_with_tokenizer
from megagpt.data.preprocessing.shards import (
    NO_TEXT,
    SHARD_BYTES,
    EncodedShard,
    OnError,
    Shard,
    lengths_file,
    plan_shards,
    tokens_file,
)
from megagpt.data.preprocessing.workers import EncodingJob, encode_in_order
from megagpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

_PROGRESS_SECONDS = 2.0
_COPY_ITEMS = 1 << 20
_JOURNAL_VERSION = 1

Report = Callable[[str], None]


@dataclass(frozen=True)
class FaultPolicy:
    """What becomes of documents that cannot be encoded."""

    on_error: OnError = "fail"
    """`fail` stops at the first, `skip` leaves them out and counts them."""
    largest_skipped_share: float = 0.01
    """With `skip`: share of bad documents above which no pair is made."""

    def __post_init__(self) -> None:
        """Checks the range."""
        if not 0 <= self.largest_skipped_share <= 1:
            raise ValueError(
                f"largest_skipped_share={self.largest_skipped_share} must lie between 0 and 1; "
                "give such a share"
            )


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer_path: str | Path,
    file_format: str = "auto",
    json_key: str = "text",
    workers: int = 1,
    faults: FaultPolicy | None = None,
    report: Report | None = None,
) -> Manifest:
    """Encodes files, in order, into one pair; the bytes do not depend on `workers`.

    Args:
        inputs: JSONL or text files, plain or packed (.gz, .zst), or globs of them.
        output_prefix: Path of the pair without its suffix.
        tokenizer_path: See `load_tokenizer`.
        file_format: `jsonl`, `text`, or `auto` for by suffix.
        json_key: Key of the text in JSONL.
        workers: Processes that encode.
        faults: What becomes of bad documents; default: the first one stops the job.
        report: Receives lines of progress; default none.

    Returns:
        The manifest, which is also written.

    Raises:
        ValueError: For anything wrong in the inputs; an older pair then stays as it was.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1; give a positive number")
    report = report or (lambda line: None)
    paths = expand_inputs(inputs)
    files = [(path, resolve_format(path, file_format)) for path in paths]
    faults = faults or FaultPolicy()
    tokenizer = load_tokenizer(tokenizer_path)
    identity = _identity(files, tokenizer, json_key)
    shards = plan_shards(files, SHARD_BYTES)
    job = EncodingJob(
        directory=Path(f"{output_prefix}.partial"),
        tokenizer_path=tokenizer.path,
        slow_reason=_slow_reason(tokenizer, files, json_key, report),
        json_key=json_key,
        on_error=faults.on_error,
    )
    writer = IndexedDatasetWriter(output_prefix, token_dtype(tokenizer.vocab_size), resume=True)
    try:
        partial = _PartialPair(writer, shards, identity, faults, report)
        progress = _Progress(shards, partial.num_shards, report)
        todo = shards[partial.num_shards :]
        for encoded in encode_in_order(job, todo, workers=min(workers, max(len(todo), 1))):
            partial.append(encoded)
            progress.add(shards[encoded.number].num_bytes)
        partial.require_acceptable()
        if _identity(files, tokenizer, json_key) != identity:
            raise ValueError("an input changed while it was read; run again when all are whole")
        manifest = publish_pair(
            writer,
            **tokenizer_facts(tokenizer),
            text_bytes=partial.text_bytes,
            skipped=dict(sorted(partial.skipped.items())),
            sources=tuple(partial.sources),
        )
    except BaseException:
        if writer.num_documents:
            report(
                f"kept in {writer.directory}: {writer.num_documents} documents; the same command "
                "goes on from there"
            )
            writer.close()
        else:
            writer.abort()
        raise
    progress.finish(manifest)
    return manifest


class _PartialPair:
    """A pair under way: what the writer has, and the journal that says so.

    Takes up an earlier run of the same job, whose journal is in the writer's folder.
    """

    def __init__(
        self,
        writer: IndexedDatasetWriter,
        shards: list[Shard],
        identity: dict[str, Any],
        faults: FaultPolicy,
        report: Report,
    ) -> None:
        self.writer = writer
        self.shards = shards
        self.faults = faults
        self.report = report
        self.num_shards = 0
        self.text_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.sources: list[Source] = []
        self.file = _FileCounts()
        self._journal_path = writer.directory / "journal.jsonl"
        for left in writer.directory.glob("shard_*"):
            left.unlink()
        records = _read_journal(self._journal_path)
        if records and records[0] != identity:
            report(f"starting anew: {writer.directory} is of other inputs or options")
            records = []
        try:
            self._rewind(records)
        except ValueError as error:  # killed while its files were put in place
            report(f"starting anew: {error}")
            records = []
            self._rewind(records)
        for record in records[1:]:
            self._note(record)
        self._hash = self._hash_so_far()
        if self.num_shards:
            report(f"going on from {writer.directory}: {self.num_shards} of {len(shards)} shards")
        with self._journal_path.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records or [identity])

    def _rewind(self, records: list[dict[str, Any]]) -> None:
        self.writer.rewind(
            WriterState(**records[-1]["writer"]) if records[1:] else WriterState(),
            [crc32 for record in records[1:] for crc32 in record["bin_crc32"]],
        )

    def append(self, encoded: EncodedShard) -> None:
        """Adds a shard and notes it.

        Raises:
            ValueError: If it ended at a bad document, or a file of it holds no text.
        """
        shard = self.shards[encoded.number]
        finished: list[Source] = []
        for number, (part, counts) in enumerate(zip(shard.parts, encoded.parts, strict=False)):
            if part.begin == 0:
                self.file, self._hash = _FileCounts(), hashlib.sha256()
            for which, line, message in encoded.faults:
                if which == number:
                    self.report(f"left out: {part.path}:{self.file.num_lines + line}: {message}")
            if encoded.error is not None and encoded.error[0] == number:
                _, line, message = encoded.error
                raise ValueError(f"{part.path}:{self.file.num_lines + line}: {message}")
            self.file.num_lines += counts.num_lines
            self.file.num_documents += counts.num_documents
            _hash_range(part.path, part.begin, part.end, self._hash)
            if part.is_last:
                self._require_text(part.path, encoded)
                finished.append(Source(part.path, part.end, self._hash.hexdigest()))
        num_blocks = len(self.writer.bin_crc32)
        self._append_tokens(encoded.number)
        self.writer.flush()
        record = {
            "writer": dataclasses.asdict(self.writer.state),
            "bin_crc32": self.writer.bin_crc32[num_blocks:],
            "text_bytes": encoded.text_bytes,
            "skipped": encoded.skipped,
            "file": dataclasses.asdict(self.file),
            "sources": [dataclasses.asdict(source) for source in finished],
        }
        with self._journal_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._note(record)

    def require_acceptable(self) -> None:
        """Checks the whole.

        Raises:
            ValueError: If there is no document, or too many were left out.
        """
        num_bad = sum(count for reason, count in self.skipped.items() if reason != NO_TEXT)
        num_all = num_bad + self.writer.num_documents
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        if self.writer.num_documents == 0:
            raise ValueError(f"the input holds no text ({counts}); give files with text")
        if num_bad > self.faults.largest_skipped_share * num_all:
            raise ValueError(
                f"{num_bad} of {num_all} documents are bad ({counts}), allowed is a share of "
                f"{self.faults.largest_skipped_share:g}; mend the input or raise "
                "--largest_skipped_share"
            )

    def _require_text(self, path: str, encoded: EncodedShard) -> None:
        if self.file.num_documents:
            return
        message = f"input {path} holds no text; give a file with text or leave it out"
        if self.faults.on_error == "fail":
            raise ValueError(message)
        encoded.skipped["file without text"] += 1
        self.report(f"left out: {message}")

    def _append_tokens(self, number: int) -> None:
        tokens_path = tokens_file(self.writer.directory, number)
        lengths_path = lengths_file(self.writer.directory, number)
        for tokens in read_blocks(tokens_path, self.writer.dtype, _COPY_ITEMS):
            self.writer.add_tokens(tokens)
        lengths = np.fromfile(lengths_path, dtype="<i4")
        self.writer.add_lengths(lengths, np.ones(len(lengths), dtype=np.int32))
        tokens_path.unlink()
        lengths_path.unlink()

    def _note(self, record: dict[str, Any]) -> None:
        self.num_shards += 1
        self.text_bytes += record["text_bytes"]
        self.skipped.update(record["skipped"])
        self.sources += [Source(**source) for source in record["sources"]]
        self.file = _FileCounts(**record["file"])

    def _hash_so_far(self) -> Any:
        """The hash of what came before in the file that the next shard begins in the middle of."""
        digest = hashlib.sha256()
        if self.num_shards < len(self.shards):
            part = self.shards[self.num_shards].parts[0]
            _hash_range(part.path, 0, part.begin, digest)
        return digest


@dataclass
class _FileCounts:
    """Of the input file that is being appended."""

    num_lines: int = 0
    num_documents: int = 0


def _slow_reason(
    tokenizer: Tokenizer, files: list[tuple[str, str]], json_key: str, report: Report
) -> str | None:
    """Why the compiled encoder is not used, after trying it on the first documents."""
    encoder = DocumentEncoder(tokenizer)
    reason = encoder.slow_reason or compare_with_tokenizer(
        encoder, _first_texts(files[0], json_key)
    )
    if reason is not None:
        report(f"encoding with {tokenizer.kind} itself, many times slower: {reason}")
    return reason


def _first_texts(file: tuple[str, str], json_key: str) -> Iterator[str]:
    """Documents of a file's beginning, up to the first that is bad."""
    part = Part(*file, 0, os.stat(file[0]).st_size)
    try:
        for line, record in enumerate(read_records(part), 1):
            yield record_text(record, part, json_key, line)
    except BadDocument:
        return  # it is met again, and told with its place


def _identity(files: list[tuple[str, str]], tokenizer: Tokenizer, json_key: str) -> dict[str, Any]:
    """What must be the same for a job to be gone on with."""
    stats = [os.stat(path) for path, _ in files]
    return {
        "version": _JOURNAL_VERSION,
        "files": [
            [path, file_format, stat.st_size, stat.st_mtime_ns]
            for (path, file_format), stat in zip(files, stats, strict=True)
        ],
        "tokenizer_sha256": tokenizer.sha256,
        "eod": tokenizer.eod,
        "json_key": json_key,
        "shard_bytes": SHARD_BYTES,
    }


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a journal; what a killed run wrote half is left out."""
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _hash_range(path: str, begin: int, end: int, digest: Any) -> None:
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end and (content := file.read(min(_COPY_ITEMS, end - begin))):
            digest.update(content)
            begin += len(content)


class _Progress:
    """Lines with the share done, MB/s and the time left."""

    def __init__(self, shards: list[Shard], num_done: int, report: Report) -> None:
        self._total_bytes = sum(shard.num_bytes for shard in shards)
        self._before_bytes = sum(shard.num_bytes for shard in shards[:num_done])
        self._report = report
        self._start_seconds = self._last_seconds = time.monotonic()
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.monotonic()
        if now - self._last_seconds < _PROGRESS_SECONDS:
            return
        self._last_seconds = now
        rate = self._done_bytes / (now - self._start_seconds)
        done = self._before_bytes + self._done_bytes
        self._report(
            f"encoded {done / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, "
            f"{rate / 1e6:.2f} MB/s, {(self._total_bytes - done) / rate:.0f} s left"
        )

    def finish(self, manifest: Manifest) -> None:
        seconds = time.monotonic() - self._start_seconds
        skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
        self._report(
            f"documents={manifest.num_documents} tokens={manifest.num_tokens} "
            f"bytes_per_token={(manifest.text_bytes or 0) / manifest.num_tokens:.3f} "
            f"skipped={skipped or 0} seconds={seconds:.1f} "
            f"MB_per_second={self._done_bytes / 1e6 / max(seconds, 1e-9):.2f}"
        )


def report_to_stderr(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)
