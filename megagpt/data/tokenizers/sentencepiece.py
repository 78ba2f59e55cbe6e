"""SentencePiece: models of any origin, and the training of our own.

Models that `train_sentencepiece` makes give back every text exactly.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megagpt.data.tokenizers.protocol import read_tokenizer_file, require_tokens
from megagpt.files import write_atomically

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space; it decodes both to a space."""
_EOD_PIECE = "<eod>"


class SentencePieceTokenizer:
    """A SentencePiece model of any origin that has an end symbol (`<eod>` or `</s>`).

    Args:
        path: The .model file.
        eod: A control symbol that ends documents, or its number; default: as above.

    Raises:
        ValueError: If the file is missing, is no model, or has no end symbol.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path, *, eod: str | int | None = None) -> None:
        self.path = str(path)
        content = read_tokenizer_file(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model; train one with megagpt tokenizer"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        unknown = self._processor.unk_id()
        self.unknown: int | None = unknown if unknown >= 0 else None
        self.eod: int = self._end_of_document(eod)
        if self.eod < 0:
            raise ValueError(
                f"{path} has no control symbol {_EOD_PIECE} nor an end-of-sentence symbol to end "
                "documents with; train the model with one"
            )
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        # A model that prefixes texts with a space would do so after each cut.
        prefixes = self._processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        splits = all(self._processor.is_byte(piece) for piece in mark) and not prefixes
        self._mark_ids = mark if splits else None
        self._content = content

    def _end_of_document(self, asked: str | int | None) -> int:
        processor = self._processor
        if asked is None:
            token = processor.piece_to_id(_EOD_PIECE)
            return token if processor.is_control(token) else processor.eos_id()
        token = asked if isinstance(asked, int) else processor.piece_to_id(asked)
        if not (0 <= token < self.vocab_size and processor.is_control(token)):
            control = [i for i in range(self.vocab_size) if processor.is_control(i)]
            raise ValueError(
                f"{asked} is no control symbol of {self.path}; its are "
                f"{', '.join(map(processor.id_to_piece, control)) or 'none'}, give one with --eod"
            )
        return token

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
        if self._mark_ids is None or SPACE_MARK not in text:
            return self._processor.encode(text, out_type=int)
        first, *rest = self._processor.encode(text.split(SPACE_MARK), out_type=int)
        for ids in rest:
            first += self._mark_ids + ids
        return first

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._processor.decode(require_tokens(ids, self.vocab_size))


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
    faults: list[Exception] = []

    def lines() -> Iterator[str]:
        try:
            yield from (line for text in texts for line in text.split("\n") if line.strip())
        except Exception as fault:  # SentencePiece would end with an error of its own instead
            faults.append(fault)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
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
            eos_piece=_EOD_PIECE,
            bos_id=-1,
            pad_id=-1,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        if not faults:
            raise ValueError(_training_error(str(error), vocab_size)) from error
    if faults:
        raise faults[0]
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
