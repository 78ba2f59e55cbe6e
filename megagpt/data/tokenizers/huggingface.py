"""Hugging Face's tokenizer.json, through their `tokenizers` library (the extra `huggingface`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megagpt.data.tokenizers.protocol import read_tokenizer_file, require_tokens

# Names that model families give to the token between documents, the more particular first.
EOD_TOKENS = (
    "<eod>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
)


class HuggingFaceTokenizer:
    """A tokenizer.json that has a special token to end documents with, see EOD_TOKENS.

    Special tokens are never read from text: `<|endoftext|>` in a document stays text. Added tokens
    that are not special are, as everywhere.

    Args:
        path: The tokenizer.json.

    Raises:
        ValueError: If the library or the file is missing, it is no tokenizer, or has no end token.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"{path} needs the library tokenizers; pip install 'megagpt[huggingface]'"
            ) from error
        self.path = str(path)
        content = read_tokenizer_file(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads "
                f"({error}); give one in its format"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        special = {
            added.content: token
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special
        }
        ends = [special[name] for name in EOD_TOKENS if name in special]
        if not ends:
            raise ValueError(
                f"{path} has none of the special tokens {', '.join(EOD_TOKENS)} to end documents "
                f"with (it has {', '.join(sorted(special)) or 'none'}); add one as special"
            )
        self.eod: int = ends[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"tokenizer {self.path} cannot encode {_beginning(text)} ({error}); mend it, or "
                "take one that has a token for every text"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none."""
        tokens = require_tokens(ids, self.vocab_size)
        try:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)
        except Exception as error:
            raise ValueError(
                f"tokenizer {self.path} cannot decode tokens {_beginning(str(tokens))} ({error}); "
                "mend its decoder"
            ) from error


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
