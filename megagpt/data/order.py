"""The order of samples: which tokens sample i is made of.

The sequences of an epoch are joined in shuffled order into one stream. A sample takes seq_length
+ 1 tokens of it and the next begins at its last, so each token but the first is predicted once;
then the samples are shuffled. Next file: `gpt_dataset.py`, which reads the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagpt.data.indexed_dataset import IndexedDataset

_LARGEST = 2**32 - 1


@dataclass(frozen=True)
class SampleIndex:
    """Where samples begin: 8 bytes a sample, 4 a sequence."""

    sequences: np.ndarray
    """[q], uint32: sequences of the pair in the order of the stream; none is empty."""
    samples: np.ndarray
    """[n, 2], uint32: for each sample its place in `sequences`, and the tokens skipped there."""


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
    bounds = np.asarray(indexed.document_indices[documents.start : documents.stop + 1])
    lengths = np.asarray(indexed.sequence_lengths[bounds[0] : bounds[-1]])
    if len(bounds) - 1 == len(lengths) and np.all(np.diff(bounds) == 1):
        with_text = np.flatnonzero(lengths)
        num_tokens = int(lengths.sum(dtype=np.int64))
    else:
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds - bounds[0]]
        with_text = np.flatnonzero(np.diff(ends))
        num_tokens = int(ends[-1])
    num_samples = (num_tokens - 1) // seq_length if shuffle else -(-(num_tokens - 1) // seq_length)
    starts = range(0, num_samples * seq_length, seq_length)
    if shuffle:
        entropy = np.random.SeedSequence([seed, epoch])
        generator = np.random.Generator(np.random.PCG64(entropy))
        with_text = generator.permutation(with_text)
        slots = generator.permutation(num_samples)
    sequences = _sequences(with_text, bounds)
    samples = _sample_starts(indexed, sequences, starts)
    return SampleIndex(sequences, _reorder(samples, slots) if shuffle else samples)


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
    lengths = np.asarray(indexed.sequence_lengths)
    own = np.arange(sequences.start, sequences.stop, dtype=np.uint32)
    per_epoch = int(lengths[own].sum(dtype=np.int64))
    num_epochs = -(-(num_samples * seq_length + 1) // per_epoch)
    total = (num_epochs * per_epoch - 1) // seq_length
    before_last = ((num_epochs - 1) * per_epoch - 1) // seq_length
    wanted_of_last = num_samples - before_last
    separate = num_epochs > 1 and wanted_of_last < int(0.8 * ((per_epoch - 1) // seq_length))
    together = before_last if separate else total

    state = np.random.RandomState(seed)
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
    starts = range(0, total * seq_length, seq_length)
    return SampleIndex(stream, _reorder(_sample_starts(indexed, stream, starts), slots))


def _sequences(documents: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sequences of documents in their order: [q], uint32."""
    first, counts = bounds[documents], bounds[documents + 1] - bounds[documents]
    if np.any(counts != 1):
        # Each document's sequences one after the other: its first, and so many on.
        ends = np.cumsum(counts)
        first = np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    assert not len(first) or first.max() <= _LARGEST, "more sequences than uint32 counts"
    return first.astype(np.uint32)


def _sample_starts(indexed: IndexedDataset, sequences: np.ndarray, starts: range) -> np.ndarray:
    """Place in the sequences, and tokens skipped there, of positions of the stream: [n, 2]."""
    ends = np.cumsum(indexed.sequence_lengths[sequences], dtype=np.int64)
    positions = np.arange(starts.start, starts.stop, starts.step, dtype=np.int64)
    places = np.searchsorted(ends, positions, side="right")
    begins = np.concatenate([[0], ends[:-1]])
    samples = np.empty((len(positions), 2), dtype=np.uint32)
    samples[:, 0] = places
    samples[:, 1] = positions - begins[places]
    return samples


def _reorder(samples: np.ndarray, slots: np.ndarray) -> np.ndarray:
    return samples.view(np.uint64)[slots].view(np.uint32)
