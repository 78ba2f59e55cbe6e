"""JSONL or plain text to a .bin/.idx pair with its manifest.

The input is divided into shards (`shards.py`). Workers encode them (`workers.py`); the parent
appends them in order (`partial_pair.py`), so that the same command goes on after an interruption.
Memory does not grow with the corpus. Imports no torch, so that the command starts at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megagpt.data.indexed.dataset import token_dtype
from megagpt.data.indexed.manifest import Manifest, publish_pair, tokenizer_facts
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.preprocessing.documents import expand_inputs, read_documents, resolve_format
from megagpt.data.preprocessing.encoder import DocumentEncoder, compare_with_tokenizer
from megagpt.data.preprocessing.fidelity import require_whole, told
from megagpt.data.preprocessing.partial_pair import PartialPair, job_identity
from megagpt.data.preprocessing.progress import Progress, Report
from megagpt.data.preprocessing.shards import (
    NO_TEXT,
    SHARD_BYTES,
    EncodingJob,
    OnError,
    plan_shards,
)
from megagpt.data.preprocessing.workers import encode_in_order
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.data.tokenizers.protocol import Tokenizer


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer_path: str | Path,
    eod: str | None = None,
    file_format: str = "auto",
    json_key: str = "text",
    workers: int = 1,
    on_error: OnError = "fail",
    largest_skipped_share: float = 0.01,
    largest_lost_share: float = 0.01,
    report: Report | None = None,
) -> Manifest:
    """Encodes files, in order, into one pair; the bytes do not depend on `workers`.

    Args:
        inputs: JSONL or text files, plain or packed (.gz, .zst), or globs of them.
        output_prefix: Path of the pair without its suffix.
        tokenizer_path: See `load_tokenizer`.
        eod: Name of the token that ends documents; default: what the tokenizer says.
        file_format: `jsonl`, `text`, or `auto` for by suffix.
        json_key: Key of the text in JSONL.
        workers: Processes that encode.
        on_error: `fail` stops at the first bad document, `skip` leaves them out and counts them.
        largest_skipped_share: With `skip`: share of bad documents above which no pair is made.
        largest_lost_share: Share of bytes that do not come back from their tokens, and of unknown
            tokens, above which no pair is made.
        report: Receives lines of progress; default none.

    Returns:
        The manifest, which is also written.

    Raises:
        ValueError: For anything wrong in the inputs; an older pair then stays as it was.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1; give a positive number")
    require_share("largest_skipped_share", largest_skipped_share)
    require_share("largest_lost_share", largest_lost_share)
    report = report or (lambda line: None)
    files = [(path, resolve_format(path, file_format)) for path in expand_inputs(inputs)]
    tokenizer = load_tokenizer(tokenizer_path, eod=eod)
    identify = partial(job_identity, files, tokenizer, json_key=json_key, shard_bytes=SHARD_BYTES)
    identity = identify()
    shards = plan_shards(files, SHARD_BYTES)
    slow_reason = _slow_reason(tokenizer, files[0], json_key, report)
    writer = IndexedDatasetWriter(output_prefix, token_dtype(tokenizer.vocab_size), resume=True)
    job = EncodingJob(
        writer.directory, tokenizer.path, tokenizer.eod, slow_reason, json_key, on_error
    )
    try:
        pair = PartialPair(writer, shards, identity, on_error, report)
        done, todo = shards[: pair.num_shards], shards[pair.num_shards :]
        total, before = (sum(shard.num_bytes for shard in each) for each in (shards, done))
        progress = Progress(total, before, report)
        for encoded in encode_in_order(job, todo, workers=min(workers, max(len(todo), 1))):
            pair.append(encoded)
            progress.add(shards[encoded.number].num_bytes)
        require_acceptable(pair.skipped, writer.num_documents, largest_skipped_share)
        fidelity, text_bytes = pair.fidelity, pair.text_bytes
        if not fidelity.is_whole:
            counts = {"text_bytes": text_bytes, "num_documents": writer.num_documents}
            report(told(fidelity, **counts))
        require_whole(
            fidelity,
            text_bytes=text_bytes,
            num_tokens=writer.num_tokens,
            largest_share=largest_lost_share,
        )
        if identify() != identity:
            raise ValueError("an input changed while it was read; run again when all are whole")
        manifest = publish_pair(
            writer,
            **tokenizer_facts(tokenizer),
            text_bytes=text_bytes,
            fidelity=fidelity,
            skipped=dict(sorted(pair.skipped.items())),
            sources=tuple(pair.sources),
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


def require_share(name: str, share: float) -> None:
    """Refuses what is no share."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share} must lie between 0 and 1; give such a share")


def require_acceptable(skipped: Mapping[str, int], num_documents: int, share: float) -> None:
    """Refuses an input without text, or with more bad documents than a share of all.

    Raises:
        ValueError: With their number by reason.
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if num_documents == 0:
        raise ValueError(f"the input holds no text ({counts}); give files with text")
    num_bad = sum(count for reason, count in skipped.items() if reason != NO_TEXT)
    num_all = num_bad + num_documents
    if num_bad > share * num_all:
        raise ValueError(
            f"{num_bad} of {num_all} documents are bad ({counts}), allowed is a share of "
            f"{share:g}; mend the input or raise --largest_skipped_share"
        )


def _slow_reason(
    tokenizer: Tokenizer, file: tuple[str, str], json_key: str, report: Report
) -> str | None:
    """Why the compiled encoder is not used, after trying it on the first documents."""
    encoder, (path, file_format) = DocumentEncoder(tokenizer), file
    reason = encoder.slow_reason
    if reason is None:
        texts = read_documents([path], file_format=file_format, json_key=json_key)
        with contextlib.suppress(ValueError):  # a bad document, met again and told with its place
            reason = compare_with_tokenizer(encoder, texts)
    if reason is not None:
        report(f"encoding with {tokenizer.kind} itself, many times slower: {reason}")
    return reason
