"""Trains a SentencePiece tokenizer on JSONL or plain text."""

from __future__ import annotations

import argparse
import sys

from megagpt.config.command import run_command
from megagpt.data.preprocessing.documents import read_documents
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece


def main(arguments: list[str]) -> int:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .txt")
    parser.add_argument("--output", required=True, metavar="PATH.model")
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--model_type", default="bpe", choices=["bpe", "unigram"])
    parser.add_argument("--format", default="auto", choices=["auto", "jsonl", "text"])
    parser.add_argument("--json_key", default="text", help="key of the text in JSONL")
    options = parser.parse_args(arguments)
    texts = read_documents(options.input, file_format=options.format, json_key=options.json_key)
    tokenizer = train_sentencepiece(
        texts, options.output, vocab_size=options.vocab_size, model_type=options.model_type
    )
    print(
        f"{tokenizer.path}: vocab_size={tokenizer.vocab_size} eod={tokenizer.eod}", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
