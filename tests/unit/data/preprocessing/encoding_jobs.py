"""Small preprocessing jobs, in this process and by the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megagpt.data.preprocessing.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[4]
COMMAND = [sys.executable, "-m", "megagpt", "preprocess"]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def encode(path, prefix, **options):
    return preprocess([path], prefix, tokenizer_path="byte", **options)


def run_tool(*arguments):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
