"""Makes a run folder, with a checkpoint at step 0, of a GPT-2, Llama or Qwen3 of transformers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megagpt.checkpoint.huggingface.convert import MODEL_FILE, import_checkpoint
from megagpt.config.command import run_command


def main(arguments: list[str]) -> int:
    """Parses the command line, imports, and tells how to train on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", required=True, type=Path, help="folder with config.json and safetensors"
    )
    parser.add_argument("--output", required=True, type=Path, help="run folder to make")
    options = parser.parse_args(arguments)
    step = import_checkpoint(options.input, options.output)
    print(f"wrote {step}")
    print(
        f"train on with: launch/pretrain.py --config {options.output / MODEL_FILE} "
        f"--checkpoint.load {options.output} --output_dir ANOTHER --data.path PREFIX"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
