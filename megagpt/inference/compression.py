"""Bits per byte of general compressors and an order-2 model, to measure a trained GPT against."""

from __future__ import annotations

import bz2
import gzip
import math
from collections.abc import Sequence

import numpy as np


def baselines(train_texts: Sequence[str], test_text: str) -> dict[str, float]:
    """Bits per UTF-8 byte of a text under three references.

    gzip and bzip2 compress the test text alone; the order-2 model learns from the training texts,
    as a GPT does.

    Args:
        train_texts: Training documents.
        test_text: Held-out text.

    Returns:
        gzip_bits_per_byte, bzip2_bits_per_byte and order2_bits_per_byte.

    Raises:
        ValueError: If either holds no text.
    """
    test = test_text.encode()
    train = [text.encode() for text in train_texts if text]
    if not test or not train:
        raise ValueError("the baselines need training and test text, one holds none; give both")
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(test, 9, mtime=0)) / len(test),
        "bzip2_bits_per_byte": 8 * len(bz2.compress(test, 9)) / len(test),
        "order2_bits_per_byte": order2_bits_per_byte(train, test),
    }


def order2_bits_per_byte(train: Sequence[bytes], test: bytes) -> float:
    """Cross entropy of an interpolated order-2 byte model, trained on documents, on a text.

    Witten-Bell interpolation: with counts n and u distinct followers of a context,
    p(c | context) = (n(context, c) + u * p_shorter(c)) / (n(context) + u), down to uniform bytes.
    A document begins in the context of two newlines.

    Args:
        train: Training documents.
        test: Text to score; counts do not change on it.

    Returns:
        Bits per byte of the test text.

    Source: Witten and Bell 1991, "The zero-frequency problem", method C.
    """
    start = b"\n\n"
    used = np.unique(np.frombuffer(start + test + b"".join(train), dtype=np.uint8))
    code = np.zeros(256, dtype=np.int64)
    code[used] = np.arange(len(used))
    size = len(used)
    counts = np.zeros(size**3, dtype=np.int64)
    for document in train:
        symbols = code[np.frombuffer(start + document, dtype=np.uint8)]
        keys = (symbols[:-2] * size + symbols[1:-1]) * size + symbols[2:]
        counts += np.bincount(keys, minlength=size**3)
    order2 = counts.reshape(size, size, size)  # [before last, last, next]
    order1 = order2.sum(axis=0)  # [last, next]
    order0 = order1.sum(axis=0)  # [next]

    symbols = code[np.frombuffer(start + test, dtype=np.uint8)]
    before, last, following = symbols[:-2], symbols[1:-1], symbols[2:]
    probability = np.full(len(test), 1 / 256)
    for table, context in ((order0, ()), (order1, (last,)), (order2, (before, last))):
        seen = table[(*context, following)]
        total, distinct = table.sum(axis=-1)[context], (table > 0).sum(axis=-1)[context]
        interpolated = (seen + distinct * probability) / np.maximum(total + distinct, 1)
        probability = np.where(total > 0, interpolated, probability)
    return float(-np.log(probability).mean() / math.log(2))
