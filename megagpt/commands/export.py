"""Writes a checkpoint as a folder that transformers opens, with its tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

from megagpt.commands import add_model_arguments
from megagpt.inference.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_model_arguments(parser, without_tokenizer="; none leaves it out")
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder to make")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--max_shard_gib", type=float, default=5.0, help="size of one file of weights")


def main(options: argparse.Namespace) -> None:
    """Exports, and tells what became of the tokenizer."""
    note = export(
        Path(options.checkpoint),
        options.output,
        dtype=options.dtype,
        max_shard_gib=options.max_shard_gib,
        tokenizer_path=options.tokenizer,
        eod=options.eod,
    )
    print(f"wrote {options.output}; {note}")
