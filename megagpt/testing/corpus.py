"""A small corpus for tests and benchmarks, made by the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def byte_corpus(directory: Path, documents: Iterable[str]) -> Path:
    """Encodes documents as bytes.

    Args:
        directory: Where the pair and its text are written.
        documents: Texts.

    Returns:
        The prefix of the .bin/.idx pair.
    """
    source, prefix = directory / "text.jsonl", directory / "text"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    subprocess.run(
        [sys.executable, "-m", "megagpt", "preprocess", "--input", str(source)]
        + ["--output_prefix", str(prefix), "--tokenizer", "byte"],
        check=True,
        capture_output=True,
    )
    return prefix
