"""Encodes JSONL or plain text into a Megatron .bin/.idx pair with its manifest."""

from __future__ import annotations

import argparse
import signal
import sys

from megagpt.config.command import run_command
from megagpt.data.preprocessing.faults import FaultPolicy
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.preprocessing.progress import report_to_stderr


def main(arguments: list[str]) -> int:
    """Parses the command line and encodes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl (one document a line) or .txt (one a file), also as .gz or .zst; globs too",
    )
    parser.add_argument(
        "--output_prefix", required=True, help="writes PREFIX.bin, .idx and .manifest.json"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or `byte`"
    )
    parser.add_argument("--format", default="auto", choices=["auto", "jsonl", "text"])
    parser.add_argument("--json_key", default="text", help="key of the text in JSONL")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode")
    parser.add_argument(
        "--on_error",
        default="fail",
        choices=["fail", "skip"],
        help="what a bad document does: stop the command, or be left out and counted",
    )
    parser.add_argument(
        "--largest_skipped_share",
        type=float,
        default=0.01,
        help="with --on_error skip: share of bad documents above which no pair is made",
    )
    options = parser.parse_args(arguments)
    # A terminated job ends its workers, and keeps what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    preprocess(
        options.input,
        options.output_prefix,
        tokenizer_path=options.tokenizer,
        file_format=options.format,
        json_key=options.json_key,
        workers=options.workers,
        faults=FaultPolicy(options.on_error, options.largest_skipped_share),
        report=report_to_stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
