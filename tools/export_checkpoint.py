"""Writes a checkpoint as a folder that transformers opens, with its tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megagpt.config.command import run_command
from megagpt.inference.export import export


def main(arguments: list[str]) -> int:
    """Parses the command line and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="run folder or step_* folder"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--max_shard_gib", type=float, default=5.0, help="size of one file of weights"
    )
    parser.add_argument("--tokenizer", help="default: that of the run's data; none leaves it out")
    options = parser.parse_args(arguments)
    note = export(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        max_shard_gib=options.max_shard_gib,
        tokenizer_path=options.tokenizer,
    )
    print(f"wrote {options.output}; {note}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
