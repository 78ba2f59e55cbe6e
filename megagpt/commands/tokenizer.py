"""Trains a SentencePiece tokenizer on JSONL or plain text."""

from __future__ import annotations

import argparse
import sys

from megagpt.commands import add_text_arguments
from megagpt.data.preprocessing.documents import read_documents
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_text_arguments(parser)
    add = parser.add_argument
    add("--output", required=True, metavar="PATH.model")
    add("--vocab_size", type=int, required=True)
    add("--model_type", default="bpe", choices=["bpe", "unigram"])


def main(options: argparse.Namespace) -> None:
    """Trains and tells the sizes."""
    texts = read_documents(options.input, file_format=options.format, json_key=options.json_key)
    tokenizer = train_sentencepiece(
        texts, options.output, vocab_size=options.vocab_size, model_type=options.model_type
    )
    print(
        f"{tokenizer.path}: vocab_size={tokenizer.vocab_size} eod={tokenizer.eod}", file=sys.stderr
    )
