"""What the rest of the package asks of a tokenizer, and what all tokenizers share.

A tokenizer never turns text into a control symbol: `<eod>` in a document stays text. Knows none of
them. Next file: `load.py`, which opens them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

BYTE_TOKENIZER = "byte"
"""Path and kind of the tokenizer that is in no file."""


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str
    path: str
    sha256: str
    vocab_size: int
    eod: int
    unknown: int | None
    """The token of what has none; None where there is none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control symbols give none, broken UTF-8 gives U+FFFD."""
        ...


def read_tokenizer_file(path: str | Path) -> bytes:
    """Content of a tokenizer's file.

    Raises:
        ValueError: If there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no tokenizer at {path}; give a SentencePiece .model (train one with "
            f"megagpt tokenizer), a tokenizer.json or `{BYTE_TOKENIZER}`"
        )
    return Path(path).read_bytes()


def require_tokens(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Ids that are to be decoded, as Python's integers.

    Raises:
        ValueError: If one is outside the vocabulary.
    """
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token {token} is outside the vocabulary of {vocab_size}; decode with the "
                "tokenizer that encoded it"
            )
    return [int(token) for token in ids]
