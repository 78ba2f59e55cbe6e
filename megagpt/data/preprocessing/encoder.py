"""Documents to the bytes that a pair stores: exact BPE in C++ where it applies, else the tokenizer.

BPE joins two symbols only into a piece of the vocabulary. Between two characters that stand side by
side in no piece nothing is ever joined, so the text is cut there and the tokens of each chunk are
remembered: mostly words, most of them seen before. The tokens are SentencePiece's, which is asked
too on the first documents of each run (`compare_with_tokenizer`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence

import numpy as np

from megagpt.data.indexed.dataset import token_dtype
from megagpt.data.indexed.writer import encode_tokens
from megagpt.data.native import CHUNK_CACHE_BYTES, address, load_native
from megagpt.data.tokenizers.byte import ByteTokenizer
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.data.tokenizers.sentencepiece import SPACE_MARK, SentencePieceTokenizer

_BPE, _NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 2, 1, 4, 5, 6  # of sentencepiece_model.proto
_COMPARED_BYTES = 200_000
# The compiled encoder writes three tokens at a time and moves on by as many as there were.
_SLACK_TOKENS = 4


class DocumentEncoder:
    """Encodes lists of documents, each ended by eod.

    Attributes:
        dtype: Stored type of a token.
        slow_reason: Why the tokenizer itself encodes; None where the compiled encoder does.

    Args:
        tokenizer: Loaded tokenizer.
        slow_reason: A reason to leave the compiled encoder out, such as a failed comparison.
    """

    def __init__(self, tokenizer: Tokenizer, *, slow_reason: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.dtype: np.dtype = token_dtype(tokenizer.vocab_size)
        self.slow_reason = slow_reason
        self._native: NativeBpe | None = None
        if slow_reason is None and isinstance(tokenizer, SentencePieceTokenizer):
            self.slow_reason = native_bpe_problem(tokenizer)
            if self.slow_reason is None:
                self._native = NativeBpe(tokenizer, self.dtype)

    def is_exact(self, text: str) -> bool:
        """Whether a text is known to come back from its tokens, without a look."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return True
        if self._native is None:
            return False
        assert isinstance(self.tokenizer, SentencePieceTokenizer)
        return self.tokenizer.splits_at_mark or SPACE_MARK not in text

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of documents.

        Args:
            texts: Documents without lone surrogates.

        Returns:
            All tokens back to back, [total], of `dtype`; and the tokens of each document, eod
            included, [len(texts)], int32.
        """
        if self._native is not None:
            return self._native.encode(texts)
        if isinstance(self.tokenizer, ByteTokenizer):
            eod = np.array([self.tokenizer.eod], dtype=self.dtype)
            parts = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
            encoded = [np.concatenate([part, eod], dtype=self.dtype).tobytes() for part in parts]
        else:
            encoded = [
                encode_tokens([*self.tokenizer.encode(text), self.tokenizer.eod], self.dtype)
                for text in texts
            ]
        lengths = [len(document) // self.dtype.itemsize for document in encoded]
        return np.frombuffer(b"".join(encoded), dtype=self.dtype), np.array(lengths, np.int32)


class NativeBpe:
    """The compiled encoder of a SentencePiece BPE model; see `native_bpe_problem`.

    Args:
        tokenizer: A model that it applies to.
        dtype: Stored type of a token.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, dtype: np.dtype) -> None:
        library = load_native()
        assert library is not None
        model = tokenizer.model_proto()
        self._library = library
        self._dtype = dtype
        self._eod = tokenizer.eod
        self._prefix = b" " if model.normalizer_spec.add_dummy_prefix else b""
        pieces = [piece.piece.encode() for piece in model.pieces]
        # The encoder keeps views of these.
        self._pieces = b"".join(pieces)
        self._offsets = _offsets(pieces)
        scores = np.array([piece.score for piece in model.pieces], dtype=np.float32)
        types = np.array([piece.type for piece in model.pieces], dtype=np.uint8)
        self._encoder = library.megagpt_bpe_create(
            self._pieces,
            address(self._offsets),
            address(scores),
            address(types),
            len(pieces),
            int(tokenizer.splits_at_mark),
            CHUNK_CACHE_BYTES,
        )
        weakref.finalize(self, library.megagpt_bpe_destroy, self._encoder)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of documents; see `DocumentEncoder.encode`."""
        documents = [self._prefix + text.encode() if text else b"" for text in texts]
        offsets = _offsets(documents)
        # A token stands for a byte at least; one more ends each document.
        tokens = np.empty(int(offsets[-1]) + len(texts) + _SLACK_TOKENS, dtype=self._dtype)
        lengths = np.empty(len(texts), dtype=np.int32)
        count = self._library.megagpt_bpe_encode(
            ctypes.c_void_p(self._encoder),
            b"".join(documents),
            address(offsets),
            len(texts),
            self._eod,
            self._dtype.itemsize,
            address(tokens),
            address(lengths),
        )
        return tokens[:count], lengths


def native_bpe_problem(tokenizer: SentencePieceTokenizer) -> str | None:
    """Why the compiled encoder cannot stand in for a model; None where it can."""
    model = tokenizer.model_proto()
    normalizer = model.normalizer_spec
    pieces = model.pieces
    if model.trainer_spec.model_type != _BPE:
        return "the model is not BPE"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return "the model's normaliser changes text"
    if not normalizer.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        return "the model marks spaces in another way"
    if sum(piece.type == _BYTE for piece in pieces) != 256:
        return "the model has no byte fallback"
    if not any(piece.piece == SPACE_MARK and piece.type == _NORMAL for piece in pieces):
        return "the model has no piece for a space"
    if any(piece.type == _UNUSED for piece in pieces):
        return "the model has unused pieces"
    if any("\0" in piece.piece for piece in pieces):
        return "the model has a piece of NUL, which SentencePiece cuts off"
    if any(piece.type == _USER_DEFINED and " " in piece.piece for piece in pieces):
        return "the model has user-defined pieces with a space"
    if load_native() is None:
        return "the compiled encoder is not there"
    return None


def compare_with_tokenizer(encoder: DocumentEncoder, texts: Iterable[str]) -> str | None:
    """Encodes the first documents with the tokenizer as well.

    Args:
        encoder: Under test.
        texts: Documents; about 200 kB of them are compared.

    Returns:
        None if all tokens are equal, else what differs.
    """
    if encoder.slow_reason is not None:
        return None
    compared = 0
    for number, whole in enumerate(texts, 1):
        text = whole[:_COMPARED_BYTES]
        tokens, _ = encoder.encode([text])
        if tokens.tolist() != [*encoder.tokenizer.encode(text), encoder.tokenizer.eod]:
            return f"the compiled encoder differs from {encoder.tokenizer.path} in text {number}"
        compared += len(text)
        if compared > _COMPARED_BYTES:
            break
    return None


def _offsets(parts: Sequence[bytes]) -> np.ndarray:
    """Where each part begins in the joined bytes: [len(parts) + 1], int64."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return offsets
