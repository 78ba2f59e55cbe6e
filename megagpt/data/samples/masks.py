"""Samples to the model's inputs: labels, what the loss leaves out, and where documents begin."""

# b micro-batch, s sequence

from __future__ import annotations

import numpy as np

from megagpt.data.native import address, load_native
from megagpt.data.samples.gpt_dataset import PAD

IGNORE_INDEX = -100
"""Label that the loss leaves out."""


def tokens_to_batch(
    samples: np.ndarray, *, masked_after: int | None = None, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples to the model's inputs and labels.

    Args:
        samples: [b, s + 1], int64, with PAD where there is no token.
        masked_after: End-of-document token whose successor is not scored; None scores all.
        out: [2, b, s], int64, to be filled with both; default: a new one.

    Returns:
        tokens [b, s] with 0 for PAD, and labels [b, s] with IGNORE_INDEX for PAD; int64.
    """
    if out is None:
        out = np.empty((2, samples.shape[0], samples.shape[1] - 1), dtype=np.int64)
    tokens, labels = out
    tokens[:], labels[:] = samples[:, :-1], samples[:, 1:]
    unscored = labels == PAD
    if masked_after is not None:
        unscored |= tokens == masked_after
    labels[unscored] = IGNORE_INDEX
    tokens[tokens == PAD] = 0
    return tokens, labels


def document_boundaries(tokens: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents lie in samples, in O(tokens): no mask of tokens by tokens.

    Args:
        tokens: [b, s], int64, contiguous.
        eod: Token that ends a document, and belongs to it.

    Returns:
        Position of each token in its document, [b, s], int64: 0 at the first token of a sample and
        after each eod. And the offsets of the documents in the flattened samples, [d + 1], int32:
        document i is tokens offsets[i] to offsets[i + 1], as variable-length attention takes them
        (`cu_seqlens`).
    """
    assert tokens.dtype == np.int64, f"tokens are {tokens.dtype}, not int64"
    library = load_native()
    num_samples, length = tokens.shape
    if library is not None:
        positions = np.empty(tokens.shape, dtype=np.int64)
        offsets = np.empty(tokens.size + 1, dtype=np.int32)
        count = library.megagpt_document_boundaries(
            address(tokens), num_samples, length, eod, address(positions), address(offsets)
        )
        return positions, offsets[: count + 1].copy()
    places = np.arange(length)
    starts = np.zeros(tokens.shape, dtype=np.int64)
    starts[:, 1:] = np.where(tokens[:, :-1] == eod, places[1:], 0)
    positions = places - np.maximum.accumulate(starts, axis=1)
    begins = np.flatnonzero(positions == 0)
    return positions, np.append(begins, tokens.size).astype(np.int32)
