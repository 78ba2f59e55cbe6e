"""A small corpus for tests and benchmarks, made by the real tool."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def byte_corpus(directory: Path, documents: Iterable[str]) -> Path:
    """Encodes documents as bytes; needs a checkout, for its tool.

    Args:
        directory: Where the pair and its text are written.
        documents: Texts.

    Returns:
        The prefix of the .bin/.idx pair.
    """
    source, prefix = directory / "text.jsonl", directory / "text"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    subprocess.run(
        [sys.executable, str(_TOOL), "--input", str(source)]
        + ["--output_prefix", str(prefix), "--tokenizer", "byte"],
        check=True,
        capture_output=True,
    )
    return prefix
