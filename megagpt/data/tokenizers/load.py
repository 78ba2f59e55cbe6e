"""The tokenizer that a path stands for, and its hash.

Next files: `sentencepiece.py`, `huggingface.py`, `byte.py`, of which it chooses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megagpt.data.tokenizers.byte import ByteTokenizer
from megagpt.data.tokenizers.huggingface import HuggingFaceTokenizer
from megagpt.data.tokenizers.protocol import BYTE_TOKENIZER, Tokenizer, read_tokenizer_file
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        path: A SentencePiece .model file, a tokenizer.json, or `byte`.

    Raises:
        ValueError: If there is none.
    """
    if str(path) == BYTE_TOKENIZER:
        return ByteTokenizer()
    if Path(path).suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


def tokenizer_sha256(path: str | Path) -> str:
    """Hash by which a manifest knows a tokenizer.

    Raises:
        ValueError: If there is no such file.
    """
    if str(path) == BYTE_TOKENIZER:
        return ByteTokenizer.sha256
    return hashlib.sha256(read_tokenizer_file(path)).hexdigest()
