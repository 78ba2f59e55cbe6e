"""The text that the tests train tokenizers on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
TEXT = (ROOT / "megagpt/data/preprocessing/documents.py").read_text() * 2
