"""The order of samples: which tokens sample i is made of.

The sequences of an epoch are joined in shuffled order into one stream. A sample takes seq_length
+ 1 tokens of it and the next begins at its last, so each token but the first is predicted once;
then the samples are shuffled. Next file: `gpt_dataset.py`, which reads the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import PCG64, RandomState, SeedSequence

from megagpt.data.indexed.dataset import IndexedDataset

SAMPLES_PER_MARK = 16
_LARGEST = 2**32 - 1


class SampleIndex(NamedTuple):
    """Where samples begin: 4.5 bytes a sample and 4 a sequence.

    Sample i is the order[i]-th of the stream. It is found from the mark before it by walking over
    the lengths of the sequences between: some tens, unless documents are far shorter than samples.
    """

    sequences: np.ndarray
    """[q], uint32: sequences of the pair in the order of the stream."""
    order: np.ndarray
    """[n], uint32: place in the stream of each sample."""
    marks: np.ndarray
    """[m, 2], uint32: for each SAMPLES_PER_MARK-th sample of the stream its place in `sequences`,
    and the tokens skipped there."""


def epoch_index(
    indexed: IndexedDataset,
    documents: range,
    *,
    seq_length: int,
    seed: int,
    epoch: int,
    shuffle: bool,
) -> SampleIndex:
    """The order of one epoch; it depends on the data, the seed and the epoch alone.

    Args:
        indexed: The pair.
        documents: Those of the split.
        seq_length: Tokens that a sample predicts.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        shuffle: False leaves documents and samples in the file's order, and the last sample may
            reach past the end of the stream.

    Raises:
        ValueError: If the index of the pair is damaged.
    """
    indexed.require_sound(documents)
    # The index's arrays lie unaligned in the file, which numpy gathers from slowly: copies.
    bounds = np.array(indexed.document_indices[documents.start : documents.stop + 1])
    lengths = np.array(indexed.sequence_lengths[bounds[0] : bounds[-1]])
    one_each = np.arange(bounds[0], bounds[0] + len(bounds))
    is_one_each = np.array_equal(bounds, one_each)
    sizes = lengths
    if not is_one_each:
        sizes = np.diff(np.append(0, np.cumsum(lengths, dtype=np.int64))[bounds - bounds[0]])
    num_tokens = int(lengths.sum(dtype=np.int64))
    num_samples = (num_tokens - 1) // seq_length if shuffle else -(-(num_tokens - 1) // seq_length)
    num_documents = int(np.count_nonzero(sizes))
    if shuffle:
        bits = PCG64(SeedSequence([seed, epoch]))
        stream, order = _permutation(num_documents, bits), _permutation(num_samples, bits)
    else:
        stream, order = (np.arange(n, dtype=np.uint32) for n in (num_documents, num_samples))
    if num_documents < len(sizes):
        stream = np.flatnonzero(sizes).astype(np.uint32)[stream]
    places = stream if is_one_each else _places(stream, bounds)
    assert not len(bounds) or bounds[-1] <= _LARGEST, "more sequences than uint32 counts"
    marks = _marks(lengths[places], num_samples, seq_length)
    sequences = places.astype(np.uint32, copy=False) + np.uint32(bounds[0])
    return SampleIndex(sequences, order, marks)


def megatron_index(
    indexed: IndexedDataset, sequences: range, *, seq_length: int, seed: int, num_samples: int
) -> SampleIndex:
    """Megatron-LM's order for a run that asks for num_samples, random stream and all.

    Its epochs are shuffled together, but the last apart where it gives under 80 % of its samples.
    A run of another length has another order.

    Args:
        indexed: The pair.
        sequences: Those of the split; Megatron splits sequences, not documents.
        seq_length: Tokens that a sample predicts.
        seed: Megatron's --seed.
        num_samples: Samples that the run asks of this pair.

    Returns:
        At least num_samples samples.

    Raises:
        ValueError: If the index of the pair is damaged.

    Source: Megatron-LM, megatron/core/datasets/gpt_dataset.py, GPTDataset.
    """
    indexed.require_sound()
    lengths = np.array(indexed.sequence_lengths)
    own = np.arange(sequences.start, sequences.stop, dtype=np.uint32)
    per_epoch = int(lengths[own].sum(dtype=np.int64))
    num_epochs = -(-(num_samples * seq_length + 1) // per_epoch)
    total = (num_epochs * per_epoch - 1) // seq_length
    before_last = ((num_epochs - 1) * per_epoch - 1) // seq_length
    wanted_of_last = num_samples - before_last
    separate = num_epochs > 1 and wanted_of_last < int(0.8 * ((per_epoch - 1) // seq_length))
    together = before_last if separate else total

    state = RandomState(seed)
    stream = np.tile(own, num_epochs - separate)
    state.shuffle(stream)
    if separate:
        last = own.copy()
        state.shuffle(last)
        stream = np.concatenate([stream, last])
    slots = np.arange(together, dtype=np.uint32)
    state.shuffle(slots)
    if separate:
        rest = np.arange(together, total, dtype=np.uint32)
        state.shuffle(rest)
        slots = np.concatenate([slots, rest])
    stream = stream[lengths[stream] > 0]
    return SampleIndex(stream, slots, _marks(lengths[stream], total, seq_length))


def _permutation(size: int, bits: PCG64) -> np.ndarray:
    """A random order of 0 to size - 1: [size], uint32.

    Numbers go by the upper half of a random key each, and by their value where those are equal.
    Made of the raw bits, which no version of numpy changes.
    """
    keys = bits.random_raw(size)
    keys &= np.uint64(_LARGEST << 32)
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    return keys.astype(np.uint32)


def _places(documents: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sequences of documents in their order, counted from the first of the range; empty ones too.

    Each document's sequences stand one after the other: its first, and so many on.
    """
    first, counts = bounds[documents] - bounds[0], bounds[documents + 1] - bounds[documents]
    ends = np.cumsum(counts)
    return np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _marks(lengths: np.ndarray, num_samples: int, seq_length: int) -> np.ndarray:
    """Marks of a stream of sequences of such lengths: [m, 2], uint32."""
    ends = np.cumsum(lengths, dtype=np.int64)
    positions = np.arange(0, num_samples, SAMPLES_PER_MARK, dtype=np.int64) * seq_length
    places = np.searchsorted(ends, positions, side="right")
    marks = np.empty((len(positions), 2), dtype=np.uint32)
    marks[:, 0] = places
    marks[:, 1] = positions - (ends[places] - lengths[places])
    return marks
