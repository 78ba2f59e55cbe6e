"""Trains a SentencePiece tokenizer on JSONL or plain text."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator

from megagpt.commands import add_error_arguments, add_text_arguments
from megagpt.data.preprocessing.documents import BadDocument, read_documents
from megagpt.data.preprocessing.preprocess import require_acceptable, require_share
from megagpt.data.preprocessing.progress import report_to_stderr
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece

_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_text_arguments(parser)
    add_error_arguments(parser)
    add = parser.add_argument
    add("--output", required=True, metavar="PATH.model")
    add("--vocab_size", type=int, required=True)
    add("--model_type", default="bpe", choices=["bpe", "unigram"])


def main(options: argparse.Namespace) -> None:
    """Trains and tells the sizes."""
    require_share("largest_skipped_share", options.largest_skipped_share)
    tokenizer = train_sentencepiece(
        _texts(options),
        options.output,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
    )
    print(
        f"{tokenizer.path}: vocab_size={tokenizer.vocab_size} eod={tokenizer.eod}", file=sys.stderr
    )


def _texts(options: argparse.Namespace) -> Iterator[str]:
    """The documents; at their end the bad ones must be few enough."""
    skipped: Counter[str] = Counter()
    num_documents = 0

    def leave_out(told: str, fault: BadDocument) -> None:
        skipped[fault.reason] += 1
        if skipped.total() <= _LISTED:
            report_to_stderr(f"left out: {told}")

    for text in read_documents(
        options.input,
        file_format=options.format,
        json_key=options.json_key,
        on_bad=leave_out if options.on_error == "skip" else None,
    ):
        num_documents += 1
        yield text
    if skipped:
        require_acceptable(skipped, num_documents, options.largest_skipped_share)
