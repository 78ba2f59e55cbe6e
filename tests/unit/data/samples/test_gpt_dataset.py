"""Samples against a plain reference, and what their order depends on."""

import threading

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.samples.gpt_dataset import PAD, GPTDataset
from megagpt.data.samples.masks import IGNORE_INDEX, tokens_to_batch

# Every token is unique, so that a sample says where it comes from; one document is empty.
LENGTHS = [7, 1, 0, 30, 2, 13, 4, 9]
TOKENS = sum(LENGTHS)


def write_pair(prefix, lengths):
    begin = 0
    with IndexedDatasetWriter(prefix, np.dtype("int32")) as writer:
        for length in lengths:
            writer.add_document(np.arange(begin, begin + length))
            begin += length
    return IndexedDataset(prefix)


@pytest.fixture
def indexed(tmp_path):
    return write_pair(tmp_path / "a", LENGTHS)


def build(indexed, seq_length=5, documents=None, **options):
    documents = range(indexed.num_documents) if documents is None else documents
    return GPTDataset(indexed, documents, seq_length=seq_length, seed=1, **options)


def reference_samples(indexed, documents, seq_length):
    stream = np.concatenate([indexed.document(d) for d in documents]).tolist()
    starts = range(0, len(stream) - seq_length, seq_length)
    return [stream[start : start + seq_length + 1] for start in starts]


def permutation(size, bits):
    """Numbers by the upper half of a key each, then by value."""
    keys = [int(bits.random_raw()) >> 32 for _ in range(size)]
    return sorted(range(size), key=lambda number: (keys[number], number))


@pytest.mark.parametrize("seq_length", [1, 2, 5, 64, 65])
def test_an_epoch_is_the_joined_documents_cut_in_overlapping_samples(indexed, seq_length):
    dataset = build(indexed, seq_length)
    samples = [sample.tolist() for sample in dataset]
    bits = np.random.PCG64(np.random.SeedSequence([1, 0]))
    documents = np.flatnonzero(LENGTHS)
    documents = documents[permutation(len(documents), bits)]
    expected = reference_samples(indexed, documents, seq_length)
    assert len(samples) == len(expected) == (TOKENS - 1) // seq_length
    assert samples == [expected[i] for i in permutation(len(expected), bits)]


def test_each_epoch_predicts_a_token_at_most_once(indexed):
    dataset = build(indexed)
    for epoch in range(3):
        first = epoch * len(dataset)
        samples = [dataset[first + i] for i in range(len(dataset))]
        predicted = np.concatenate([sample[1:] for sample in samples])
        assert len(np.unique(predicted)) == len(predicted) == 5 * len(dataset)


def test_epochs_differ_and_do_not_depend_on_the_order_of_access(indexed):
    forward = build(indexed)
    wanted = [forward[i].tolist() for i in range(4 * len(forward))]
    backward = build(indexed)
    assert [backward[i].tolist() for i in reversed(range(len(wanted)))] == wanted[::-1]
    n = len(forward)
    assert wanted[:n] != wanted[n : 2 * n] != wanted[2 * n : 3 * n]


def test_seed_changes_the_order(indexed):
    documents = range(indexed.num_documents)
    one, other = (GPTDataset(indexed, documents, seq_length=5, seed=seed) for seed in (1, 2))
    assert [s.tolist() for s in one] != [s.tolist() for s in other]


@pytest.mark.parametrize("seq_length", [1, 5, 13, 65, 100])
def test_evaluation_scores_every_token_but_the_first_once_in_order(indexed, seq_length):
    dataset = build(indexed, seq_length, shuffle=False)
    tokens, labels = tokens_to_batch(np.stack(list(dataset)))
    assert tokens.shape == labels.shape == (len(dataset), seq_length)
    scored = labels[labels != IGNORE_INDEX]
    assert scored.tolist() == list(range(1, TOKENS))
    assert tokens[labels != IGNORE_INDEX].tolist() == list(range(TOKENS - 1))
    assert tokens.min() == 0 and tokens.flags.c_contiguous and labels.dtype == np.int64
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_padding_is_only_at_the_end_of_the_last_sample(indexed):
    samples = list(build(indexed, 14, shuffle=False))
    assert all((sample != PAD).all() for sample in samples[:-1])
    assert samples[-1].tolist() == [*range(56, 66), *[PAD] * 5]


def test_too_few_tokens_say_how_many_are_needed(indexed):
    with pytest.raises(ValueError, match=r"seq_length=66 needs at least 67 tokens .* has 66"):
        build(indexed, 66)
    with pytest.raises(ValueError, match="needs at least 2 tokens in the test split"):
        build(indexed, documents=range(1, 3), shuffle=False, name="test")


def test_the_next_epoch_is_built_beside_the_end_of_this_one(indexed, monkeypatch):
    dataset, plain = build(indexed, builds_ahead=True), build(indexed)
    expected = plain.gather(range(3 * len(plain)))
    built = []
    build_epoch = dataset._build_epoch

    def noted(number):
        built.append((number, threading.current_thread() is threading.main_thread()))
        return build_epoch(number)

    monkeypatch.setattr(dataset, "_build_epoch", noted)
    samples = [dataset.gather([index])[0] for index in range(3 * len(dataset))]
    np.testing.assert_array_equal(samples, expected)
    for thread in threading.enumerate():
        if thread.name.startswith("epoch "):
            thread.join()
    assert built[:2] == [(1, False), (2, False)]


def test_an_epoch_that_could_not_be_built_is_told_by_the_sample_that_needs_it(indexed, monkeypatch):
    dataset = build(indexed, builds_ahead=True)

    def fail(number):
        raise OSError("no space")

    monkeypatch.setattr(dataset, "_build_epoch", fail)
    for index in range(len(dataset)):
        dataset.gather([index])
    with pytest.raises(OSError, match="no space"):
        dataset.gather([len(dataset)])
