"""Encodes JSONL or plain text into a Megatron .bin/.idx pair with its manifest."""

from __future__ import annotations

import argparse
import signal
import sys

from megagpt.commands import add_error_arguments, add_text_arguments
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.preprocessing.progress import report_to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_text_arguments(parser)
    add_error_arguments(parser)
    add = parser.add_argument
    add("--output_prefix", required=True, help="writes PREFIX.bin, .idx and .manifest.json")
    add("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or `byte`")
    add("--eod", metavar="TOKEN", help="token that ends documents; default: the tokenizer's own")
    means = "share of bytes that tokens do not give back, or of unknown tokens, that is refused"
    add("--largest_lost_share", type=float, default=0.01, help=means)
    add("--workers", type=int, default=1, help="processes that encode")


def main(options: argparse.Namespace) -> None:
    """Encodes."""
    # A terminated job ends its workers, and keeps what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    preprocess(
        options.input,
        options.output_prefix,
        tokenizer_path=options.tokenizer,
        eod=options.eod,
        file_format=options.format,
        json_key=options.json_key,
        workers=options.workers,
        on_error=options.on_error,
        largest_skipped_share=options.largest_skipped_share,
        largest_lost_share=options.largest_lost_share,
        report=report_to_stderr,
    )
