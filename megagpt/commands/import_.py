"""Makes a run folder, with a checkpoint at step 0, of a model of transformers.

Read are GPT-2, Llama and Qwen3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megagpt.checkpoint.huggingface.convert import MODEL_FILE, import_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("--input", required=True, type=Path, help="folder with config.json and safetensors")
    add("--output", required=True, type=Path, help="run folder to make")


def main(options: argparse.Namespace) -> None:
    """Imports, and tells how to train on."""
    step = import_checkpoint(options.input, options.output)
    print(f"wrote {step}")
    print(
        f"train on with: megagpt train --config {options.output / MODEL_FILE} "
        f"--checkpoint.load {options.output} --output_dir ANOTHER --data.path PREFIX"
    )
