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


def load_tokenizer(path: str | Path, *, eod: str | int | None = None) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        path: A SentencePiece .model file, a tokenizer.json, or `byte`.
        eod: What ends documents, by name, or as the number that a manifest holds; default: what
            the tokenizer itself says.

    Raises:
        ValueError: If there is none, or none of its tokens ends documents.
    """
    if str(path) == BYTE_TOKENIZER:
        if eod not in (None, ByteTokenizer.eod):
            raise ValueError(
                f"--eod {eod} is not known to the tokenizer `{BYTE_TOKENIZER}`, whose documents "
                f"end with {ByteTokenizer.eod}; leave it out"
            )
        return ByteTokenizer()
    if Path(path).suffix == ".json":
        return HuggingFaceTokenizer(path, eod=eod)
    return SentencePieceTokenizer(path, eod=eod)


def tokenizer_sha256(path: str | Path) -> str:
    """Hash by which a manifest knows a tokenizer.

    Raises:
        ValueError: If there is no such file.
    """
    if str(path) == BYTE_TOKENIZER:
        return ByteTokenizer.sha256
    return hashlib.sha256(read_tokenizer_file(path)).hexdigest()
