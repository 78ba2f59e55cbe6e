"""Hugging Face's tokenizer.json, through their `tokenizers` library (the extra `huggingface`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from megagpt.data.tokenizers.protocol import read_tokenizer_file, require_tokens
from megagpt.files import decode_json

# Names that model families give to the token between documents.
EOD_TOKENS = (
    "<eod>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
)
_CONFIG_FILE = "tokenizer_config.json"


class HuggingFaceTokenizer:
    """A tokenizer.json with a special token that ends documents.

    That is the one asked for; else the eos_token of the tokenizer_config.json beside it; else the
    only one that has a name of EOD_TOKENS.

    Special tokens are never read from text: `<|endoftext|>` in a document stays text. Added tokens
    that are not special are, as everywhere.

    Args:
        path: The tokenizer.json.
        eod: Name of the token that ends documents, or the token, as a manifest has it.

    Raises:
        ValueError: If the library or the file is missing, it is no tokenizer, or which token ends
            documents is open.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path, *, eod: str | int | None = None) -> None:
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
        self.unknown = _unknown(content, self._tokenizer.token_to_id)
        special = {
            added.content: token
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special
        }
        self.eod: int = _end_of_document(Path(path), special, eod, self.vocab_size)

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


def _end_of_document(
    path: Path, special: dict[str, int], asked: str | int | None, vocab_size: int
) -> int:
    if isinstance(asked, int):
        if not 0 <= asked < vocab_size:
            raise ValueError(
                f"end of document {asked} is outside the {vocab_size} tokens of {path}; give the "
                "tokenizer that the data was made with"
            )
        return asked
    has = f"{path} has the special tokens {', '.join(sorted(special)) or '(none)'}"
    named, where = asked, "--eod"
    if named is None:
        where = str(path.with_name(_CONFIG_FILE))
        named = _named_by_config(path.with_name(_CONFIG_FILE))
    if named is not None:
        if named not in special:
            raise ValueError(f"{where} says that {named} ends documents; {has}, name one of them")
        return special[named]
    candidates = [name for name in EOD_TOKENS if name in special]
    if len(candidates) == 1:
        return special[candidates[0]]
    if candidates:
        raise ValueError(
            f"{path} has several tokens that may end documents: {', '.join(candidates)}; give one "
            "with --eod, or put its tokenizer_config.json beside it"
        )
    raise ValueError(f"{has}, none known to end documents; give one with --eod, or add one")


def _unknown(content: bytes, token_to_id: Callable[[str], int | None]) -> int | None:
    """The token of what has none: by name, or of Unigram by number."""
    model = decode_json(content).get("model", {})
    if isinstance(number := model.get("unk_id"), int):
        return number
    name = model.get("unk_token")
    return token_to_id(name) if isinstance(name, str) else None


def _named_by_config(path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json; None where there is none."""
    try:
        config = decode_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again or remove it") from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):  # as transformers writes an added token
        token = token.get("content")
    return token if isinstance(token, str) else None


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
