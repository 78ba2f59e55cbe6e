"""Text to token ids and back: SentencePiece models, Hugging Face's tokenizer.json, plain bytes.

A tokenizer never turns text into a control symbol: `<eod>` in a document stays text. Models that
`train_sentencepiece` makes give back every text exactly.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece

from megagpt.files import file_sha256, write_atomically

EOD_PIECE = "<eod>"
BYTE_TOKENIZER = "byte"
_NUM_BYTES = 256
# SentencePiece writes a space as U+2581 and decodes both to a space.
_SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str
    path: str
    sha256: str
    vocab_size: int
    eod: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control symbols give none, broken UTF-8 gives U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    kind = BYTE_TOKENIZER
    path = BYTE_TOKENIZER
    sha256 = hashlib.sha256(b"megagpt byte tokenizer: ids 0-255 bytes, 256 eod").hexdigest()
    vocab_size = _NUM_BYTES + 1
    eod = _NUM_BYTES

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        for token in ids:
            require_token(token, self.vocab_size)
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model of any origin that has an end symbol (`<eod>` or `</s>`).

    Args:
        path: The .model file.

    Raises:
        ValueError: If the file is missing, is no model, or has no end symbol.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if not Path(path).is_file():
            raise ValueError(
                f"no tokenizer at {path}; give a SentencePiece .model (train one with "
                f"megagpt tokenizer) or `{BYTE_TOKENIZER}`"
            )
        content = Path(path).read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model; train one with megagpt tokenizer"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        eod = self._processor.piece_to_id(EOD_PIECE)
        if not self._processor.is_control(eod):
            eod = self._processor.eos_id()
        if eod < 0:
            raise ValueError(
                f"{path} has no control symbol {EOD_PIECE} nor an end-of-sentence symbol to end "
                "documents with; train the model with one"
            )
        self.eod: int = eod
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        # A model that prefixes texts with a space would do so after each cut.
        prefixes = self._processor.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        splits = all(self._processor.is_byte(piece) for piece in mark) and not prefixes
        self._mark_ids = mark if splits else None
        self._content = content

    @property
    def splits_at_mark(self) -> bool:
        """Whether U+2581 in a text is kept apart from the spaces that it stands for in pieces."""
        return self._mark_ids is not None

    def model_proto(self) -> Any:
        """The model's parts, as sentencepiece_model.proto names them."""
        # Google's protobuf is loaded by those who look inside only.
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2  # its classes are made at its import
        return proto.ModelProto.FromString(self._content)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        if self._mark_ids is None or _SPACE_MARK not in text:
            return self._processor.encode(text, out_type=int)
        first, *rest = self._processor.encode(text.split(_SPACE_MARK), out_type=int)
        for ids in rest:
            first += self._mark_ids + ids
        return first

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        for token in ids:
            require_token(token, self.vocab_size)
        return self._processor.decode([int(token) for token in ids])


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
        # An extra: loaded by those who name such a file only.
        from megagpt.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


def tokenizer_sha256(path: str | Path) -> str:
    """Hash by which a manifest knows a tokenizer.

    Raises:
        ValueError: If there is no such file.
    """
    if str(path) == BYTE_TOKENIZER:
        return ByteTokenizer.sha256
    if not Path(path).is_file():
        raise ValueError(f"no tokenizer at {path}; give a SentencePiece .model or tokenizer.json")
    return file_sha256(path)


def train_sentencepiece(
    texts: Iterator[str],
    output: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
) -> SentencePieceTokenizer:
    """Trains a model that gives every text back exactly; the same texts give the same file.

    No normalisation, no added space, bytes for characters that are not in the vocabulary (newlines
    among them: training goes line by line). At most 2 million lines, drawn evenly, are held.

    Args:
        texts: Documents.
        output: The .model file; appears when it is whole.
        vocab_size: Tokens, 256 bytes and 2 control symbols included.
        model_type: SentencePiece's algorithm.

    Raises:
        ValueError: If the vocabulary is too small or too large for the text, or there is no text.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            eos_piece=EOD_PIECE,
            bos_id=-1,
            pad_id=-1,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), vocab_size)) from error
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model.getvalue())
    return SentencePieceTokenizer(path)


def _training_error(message: str, vocab_size: int) -> str:
    if limit := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for this text, which gives {limit[1]} tokens; "
            f"choose at most {limit[1]} or give more text"
        )
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is smaller than the {needed[1]} bytes, characters and "
            f"control symbols of this text; choose at least {needed[1]}"
        )
    if "!sentences_.empty()" in message:
        return "the input holds no text to train a tokenizer on; give files with text"
    return (
        f"SentencePiece cannot train with vocab_size={vocab_size}: {message}; change it or the text"
    )


def require_token(token: int, vocab_size: int) -> None:
    """Checks an id that is to be decoded.

    Raises:
        ValueError: If it is outside the vocabulary.
    """
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"token {token} is outside the vocabulary of {vocab_size}; decode with the tokenizer "
            "that encoded it"
        )
