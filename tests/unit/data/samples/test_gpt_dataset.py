"""Samples against a plain reference; what the order depends on; splits and their errors."""

import numpy as np
import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.datasets import build_datasets, data_fingerprint, split_bounds
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.preprocessing.preprocess import preprocess
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


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("8,1,1", 10, [(0, 8), (8, 9), (9, 10)]),
        ("1", 3, [(0, 3), (3, 3), (3, 3)]),
        ("0.5,0.5", 4, [(0, 2), (2, 4), (4, 4)]),
        ("0,0,1", 4, [(0, 0), (0, 0), (0, 4)]),
    ],
)
def test_split_by_documents(split, count, bounds):
    assert split_bounds(split, count) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1"])
def test_split_that_is_no_shares_is_refused(split):
    with pytest.raises(ValueError, match="must be up to three shares"):
        split_bounds(split, 10)


def test_one_pair_is_split_and_empty_splits_left_out_or_explained(tmp_path):
    prefix = str(tmp_path / "a")
    write_pair(prefix, [10] * 10)
    datasets = build_datasets(DataConfig(path=prefix, split="8,2"), seq_length=4, seed=0)
    assert list(datasets) == ["train", "valid"]
    assert datasets["train"].shuffle and not datasets["valid"].shuffle
    assert datasets["valid"].num_tokens == 20
    assert np.concatenate(list(datasets["train"])).max() < 80
    with pytest.raises(ValueError, match=r"test split is empty.*--data.split=8,2 .* 10 documents"):
        build_datasets(
            DataConfig(path=prefix, split="8,2"), seq_length=4, seed=0, required=("test",)
        )
    with pytest.raises(ValueError, match="train split is empty"):
        build_datasets(DataConfig(path=prefix, split="0,1,1"), seq_length=4, seed=0)


def test_one_pair_a_split(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("train", "valid")}
    write_pair(paths["train"], [10] * 3)
    write_pair(paths["valid"], [5])
    data = DataConfig(train_path=paths["train"], valid_path=paths["valid"])
    datasets = build_datasets(data, seq_length=4, seed=0)
    assert {name: each.num_tokens for name, each in datasets.items()} == {"train": 30, "valid": 5}
    with pytest.raises(ValueError, match="no test data is named; give --data.test_path"):
        build_datasets(data, seq_length=4, seed=0, required=("test",))


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no data at .*x\.idx; .*preprocess_data"):
        build_datasets(DataConfig(path=str(tmp_path / "x")), seq_length=4, seed=0)
    with pytest.raises(ValueError, match="no data is named"):
        build_datasets(DataConfig(), seq_length=4, seed=0)


def test_pairs_of_different_tokenizers_are_refused(tmp_path):
    from megagpt.data.tokenizers.tokenizer import train_sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("so long lives this and this gives life to thee\n" * 20)
    model = tmp_path / "t.model"
    train_sentencepiece(iter([text.read_text()]), model, vocab_size=300)
    for name, tokenizer in (("train", "byte"), ("valid", model)):
        preprocess([text], tmp_path / name, tokenizer_path=tokenizer)
    train, valid = str(tmp_path / "train"), str(tmp_path / "valid")
    with pytest.raises(ValueError, match="another tokenizer"):
        build_datasets(DataConfig(train_path=train, valid_path=valid), seq_length=4, seed=0)
    with pytest.raises(ValueError, match=r"data.tokenizer_path=.*t.model .* not the tokenizer"):
        build_datasets(
            DataConfig(train_path=train, tokenizer_path=str(model)), seq_length=4, seed=0
        )


def test_fingerprint_knows_the_data_after_a_move_and_not_after_a_change(tmp_path):
    prefixes = [str(tmp_path / name) for name in "abc"]
    for prefix, lengths in zip(prefixes, [[4, 5], [4, 5], [5, 4]], strict=True):
        write_pair(prefix, lengths)
    one, same, other = (data_fingerprint(DataConfig(path=prefix)) for prefix in prefixes)
    assert one == same != other
    assert one != data_fingerprint(DataConfig(path=prefixes[0], split="1,1"))
    assert one["train"][0]["num_tokens"] == 9
