"""Bytes as tokens: for every text, without training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megagpt.data.tokenizers.protocol import BYTE_TOKENIZER, require_tokens

_NUM_BYTES = 256


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    kind = BYTE_TOKENIZER
    path = BYTE_TOKENIZER
    sha256 = hashlib.sha256(b"megagpt byte tokenizer: ids 0-255 bytes, 256 eod").hexdigest()
    vocab_size = _NUM_BYTES + 1
    eod = _NUM_BYTES
    unknown: int | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        tokens = require_tokens(ids, self.vocab_size)
        return bytes(token for token in tokens if token != self.eod).decode(errors="replace")
