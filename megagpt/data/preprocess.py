"""JSONL or plain text to a .bin/.idx pair with its manifest.

Memory is bounded by the largest document times the workers; on any failure nothing is left under
the output's names. Imports no torch, so that the command starts at once.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.data.documents import Chunk, chunk_documents, read_chunks, resolve_format
from megagpt.data.indexed_dataset import (
    IndexedDatasetWriter,
    bin_path,
    encode_tokens,
    idx_path,
    token_dtype,
)
from megagpt.data.manifest import Manifest, Source, write_manifest
from megagpt.data.tokenizer import Tokenizer, load_tokenizer

_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class EncodedChunk:
    """Documents of one chunk as stored bytes."""

    path: str
    tokens: bytes
    lengths: list[int]
    """Tokens of each document, its end included."""
    text_bytes: int
    num_skipped: int
    input_bytes: int


class Encoder:
    """Encodes chunks; one in each worker.

    Args:
        tokenizer: Loaded tokenizer.
        json_key: Key of the text in JSONL.
    """

    def __init__(self, tokenizer: Tokenizer, json_key: str) -> None:
        self.tokenizer = tokenizer
        self.json_key = json_key
        self.dtype: np.dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokens of a chunk's documents, each ended by eod; documents without text are skipped.

        Raises:
            ValueError: For what is wrong in a document, with `file:line`.
        """
        parts: list[bytes] = []
        lengths: list[int] = []
        text_bytes = num_skipped = 0
        for text in chunk_documents(chunk, self.json_key):
            if not text.strip():
                num_skipped += 1
                continue
            ids = self.tokenizer.encode(text)
            ids.append(self.tokenizer.eod)
            parts.append(encode_tokens(ids, self.dtype))
            lengths.append(len(ids))
            text_bytes += len(text.encode())
        return EncodedChunk(
            chunk.path, b"".join(parts), lengths, text_bytes, num_skipped, chunk.num_bytes
        )


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer_path: str | Path,
    file_format: str = "auto",
    json_key: str = "text",
    workers: int = 1,
    report: Callable[[str], None] | None = None,
) -> Manifest:
    """Encodes files, in order, into one pair; the bytes do not depend on `workers`.

    Args:
        inputs: JSONL or text files.
        output_prefix: Path of the pair without its suffix.
        tokenizer_path: See `load_tokenizer`.
        file_format: `jsonl`, `text`, or `auto` for by suffix.
        json_key: Key of the text in JSONL.
        workers: Processes that encode.
        report: Receives lines of progress; default none.

    Returns:
        The manifest, which is also written.

    Raises:
        ValueError: For anything wrong in the inputs; an older pair then stays as it was.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1; give a positive number")
    if not inputs:
        raise ValueError("no input is named; give at least one JSONL or text file")
    formats = [resolve_format(path, file_format) for path in inputs]
    tokenizer = load_tokenizer(tokenizer_path)
    sources: list[Source] = []
    chunks = (
        chunk
        for path, each in zip(inputs, formats, strict=True)
        for chunk in read_chunks(path, each, sources)
    )
    progress = _Progress(sum(Path(path).stat().st_size for path in inputs), report)
    documents_of = dict.fromkeys(map(str, inputs), 0)
    num_skipped = text_bytes = 0
    with IndexedDatasetWriter(output_prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for encoded in _encode_in_order(chunks, tokenizer, json_key, workers):
            writer.add_documents(encoded.tokens, encoded.lengths)
            documents_of[encoded.path] += len(encoded.lengths)
            num_skipped += encoded.num_skipped
            text_bytes += encoded.text_bytes
            progress.add(encoded.input_bytes)
        for path, count in documents_of.items():
            if count == 0:
                raise ValueError(
                    f"input {path} holds no text; give a file with text or leave it out"
                )
        num_tokens, num_documents = writer.num_tokens, writer.num_documents
    manifest = Manifest(
        tokenizer_kind=tokenizer.kind,
        tokenizer_path=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=token_dtype(tokenizer.vocab_size).name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        text_bytes=text_bytes,
        bin_bytes=bin_path(output_prefix).stat().st_size,
        idx_bytes=idx_path(output_prefix).stat().st_size,
        skipped={"no text": num_skipped} if num_skipped else {},
        sources=tuple(sources),
    )
    write_manifest(output_prefix, manifest)
    progress.finish(manifest)
    return manifest


_worker_encoder: Encoder | None = None


def _start_worker(tokenizer_path: str, json_key: str) -> None:
    # A process pool hands nothing else to its tasks; each worker loads its tokenizer once.
    global _worker_encoder
    _worker_encoder = Encoder(load_tokenizer(tokenizer_path), json_key)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(chunk)


def _encode_in_order(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, json_key: str, workers: int
) -> Iterator[EncodedChunk]:
    if workers == 1:
        encoder = Encoder(tokenizer, json_key)
        yield from map(encoder.encode, chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.path, json_key),
    )
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            # Bounds memory: a pool's own map would read all the input at once.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of workers={workers} was killed, mostly for want of memory; give fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Progress:
    """Lines with the share done, MB/s and the time left."""

    def __init__(self, total_bytes: int, report: Callable[[str], None] | None) -> None:
        self._total_bytes = total_bytes
        self._report = report
        self._start_seconds = self._last_seconds = time.monotonic()
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.monotonic()
        if self._report is None or now - self._last_seconds < _PROGRESS_SECONDS:
            return
        self._last_seconds = now
        rate = self._done_bytes / (now - self._start_seconds)
        left = (self._total_bytes - self._done_bytes) / rate
        self._report(
            f"encoded {self._done_bytes / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, "
            f"{rate / 1e6:.2f} MB/s, {left:.0f} s left"
        )

    def finish(self, manifest: Manifest) -> None:
        if self._report is None:
            return
        seconds = time.monotonic() - self._start_seconds
        skipped = sum(manifest.skipped.values())
        self._report(
            f"documents={manifest.num_documents} tokens={manifest.num_tokens} "
            f"bytes_per_token={manifest.text_bytes / manifest.num_tokens:.3f} skipped={skipped} "
            f"seconds={seconds:.1f} MB_per_second={self._done_bytes / 1e6 / max(seconds, 1e-9):.2f}"
        )


def report_to_stderr(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)
