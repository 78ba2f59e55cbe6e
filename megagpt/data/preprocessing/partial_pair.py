"""A pair under way in the folder `<prefix>.partial`: shards appended in order, each in a journal.

The journal is what the same command goes on from after an interruption. Next file: `preprocess.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed.manifest import Fidelity, Source
from megagpt.data.indexed.writer import IndexedDatasetWriter, WriterState, read_blocks
from megagpt.data.preprocessing.progress import Report
from megagpt.data.preprocessing.shards import EncodedShard, OnError, PartCounts, Shard, shard_files
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.files import decode_json, flush_to_disk

_COPY_ITEMS = 1 << 20
_JOURNAL_VERSION = 2


def job_identity(
    files: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, json_key: str, shard_bytes: int
) -> dict[str, Any]:
    """What must be the same for a job to be gone on with.

    Args:
        files: Path and format of each input.
        tokenizer: That encodes them.
        json_key: Key of the text in JSONL.
        shard_bytes: Size of a shard.
    """
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
        "shard_bytes": shard_bytes,
    }


class PartialPair:
    """A pair under way: what the writer has, and the journal that says so.

    Takes up an earlier run of the same job, whose journal is in the writer's folder.

    Attributes:
        num_shards: Shards that are in it.
        text_bytes: UTF-8 bytes of their text.
        skipped: Documents left out, by reason.
        fidelity: What their tokens do not give back.
        sources: Input files that are whole in it.

    Args:
        writer: Of the pair, opened to go on.
        shards: Of the whole job.
        identity: See `job_identity`.
        on_error: Whether a file without text ends the job or is left out.
        report: Receives lines of what is left out, and where the job goes on.
    """

    def __init__(
        self,
        writer: IndexedDatasetWriter,
        shards: list[Shard],
        identity: dict[str, Any],
        on_error: OnError,
        report: Report,
    ) -> None:
        self._writer = writer
        self._shards = shards
        self._on_error = on_error
        self._report = report
        self.num_shards = 0
        self.text_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.fidelity = Fidelity()
        self.sources: list[Source] = []
        self._file = PartCounts()
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
        self._writer.rewind(
            WriterState(**records[-1]["writer"]) if records[1:] else WriterState(),
            [crc32 for record in records[1:] for crc32 in record["bin_crc32"]],
        )

    def append(self, encoded: EncodedShard) -> None:
        """Adds a shard and notes it.

        Raises:
            ValueError: If it ended at a bad document, or a file of it holds no text.
        """
        shard = self._shards[encoded.number]
        finished: list[Source] = []
        places: list[str] = []
        for number, (part, counts) in enumerate(zip(shard.parts, encoded.parts, strict=False)):
            if part.begin == 0:
                self._file, self._hash = PartCounts(), hashlib.sha256()
            for which, line, message in encoded.faults:
                if which == number:
                    self._report(f"left out: {part.path}:{self._file.num_lines + line}: {message}")
            for which, line, what in encoded.places:
                if which == number:
                    places.append(f"{part.path}:{self._file.num_lines + line} {what}")
            if encoded.error is not None and encoded.error[0] == number:
                _, line, message = encoded.error
                raise ValueError(f"{part.path}:{self._file.num_lines + line}: {message}")
            self._file.num_lines += counts.num_lines
            self._file.num_documents += counts.num_documents
            _hash_range(part.path, part.begin, part.end, self._hash)
            if part.is_last:
                if not self._file.num_documents:
                    message = (
                        f"input {part.path} holds no text; give a file with text or leave it out"
                    )
                    if self._on_error == "fail":
                        raise ValueError(message)
                    encoded.skipped["file without text"] += 1
                    self._report(f"left out: {message}")
                finished.append(Source(part.path, part.end, self._hash.hexdigest()))
        num_blocks = len(self._writer.bin_crc32)
        tokens_file, lengths_file = shard_files(self._writer.directory, encoded.number)
        for tokens in read_blocks(tokens_file, self._writer.dtype, _COPY_ITEMS):
            self._writer.add_tokens(tokens)
        lengths = np.fromfile(lengths_file, dtype="<i4")
        self._writer.add_lengths(lengths, np.ones(len(lengths), dtype=np.int32))
        tokens_file.unlink()
        lengths_file.unlink()
        self._writer.flush()
        record = {
            "writer": dataclasses.asdict(self._writer.state),
            "bin_crc32": self._writer.bin_crc32[num_blocks:],
            "text_bytes": encoded.text_bytes,
            "skipped": encoded.skipped,
            "fidelity": [
                encoded.lost_bytes,
                encoded.altered_documents,
                encoded.unknown_tokens,
                places,
            ],
            "file": dataclasses.asdict(self._file),
            "sources": [dataclasses.asdict(source) for source in finished],
        }
        with self._journal_path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            flush_to_disk(file)
        self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        self.num_shards += 1
        self.text_bytes += record["text_bytes"]
        self.skipped.update(record["skipped"])
        num_lost, num_altered, num_unknown, places = record["fidelity"]
        self.fidelity += Fidelity(num_lost, num_altered, num_unknown, tuple(places))
        self.sources += [Source(**source) for source in record["sources"]]
        self._file = PartCounts(**record["file"])

    def _hash_so_far(self) -> Any:
        """The hash of what came before in the file that the next shard begins in the middle of."""
        digest = hashlib.sha256()
        if self.num_shards < len(self._shards):
            part = self._shards[self.num_shards].parts[0]
            _hash_range(part.path, 0, part.begin, digest)
        return digest


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a journal; what a killed run wrote half is left out."""
    records: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_text().splitlines():
            records.append(decode_json(line))
    return records


def _hash_range(path: str, begin: int, end: int, digest: Any) -> None:
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end and (content := file.read(min(_COPY_ITEMS, end - begin))):
            digest.update(content)
            begin += len(content)
