"""The `data` section becomes datasets: splits, blends, validation sets, sizes that overflow."""

import numpy as np
import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.datasets import build_datasets, data_fingerprint
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.samples.blended_dataset import BlendedDataset, JoinedDataset
from megagpt.data.samples.gpt_dataset import PAD, GPTDataset
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece


def write_pair(prefix, value, *, documents=10, length=10):
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        for _ in range(documents):
            writer.add_document([value] * length)
    return str(prefix)


def write_documents(prefix, lengths):
    begin = 0
    with IndexedDatasetWriter(prefix, np.dtype("int32")) as writer:
        for length in lengths:
            writer.add_document(np.arange(begin, begin + length))
            begin += length


def build(data, **options):
    return build_datasets(data, seq_length=4, seed=0, **options)


def members_of(dataset, count):
    return dataset.gather(range(count))[:, 0].tolist()


def test_weights_are_shares_of_the_samples(tmp_path):
    weights = {write_pair(tmp_path / "a", 1): 3.0, write_pair(tmp_path / "b", 2): 1.0}
    data = DataConfig(path=weights, split="1")
    train = build(data)["train"]
    assert isinstance(train, BlendedDataset)
    values = members_of(train, 400)
    assert (values.count(1), values.count(2)) == (300, 100)
    assert all(values[:n].count(2) <= n / 4 + 1 for n in range(400))


def test_a_list_of_pairs_is_weighted_by_size(tmp_path):
    paths = [write_pair(tmp_path / "a", 1, documents=30), write_pair(tmp_path / "b", 2)]
    train = build(DataConfig(train_path=paths))["train"]
    values = members_of(train, len(train))
    assert values.count(1) == len(train.datasets[0]) == 74
    assert values.count(2) == len(train.datasets[1]) == 24


def test_splits_of_several_pairs_hold_a_part_of_each(tmp_path):
    weights = {write_pair(tmp_path / "a", 1): 1.0, write_pair(tmp_path / "b", 2): 9.0}
    valid = build(DataConfig(path=weights, split="8,2"))["valid"]
    assert isinstance(valid, JoinedDataset)
    samples = valid.gather(range(len(valid)))
    assert [int(np.sum(samples[:, 1:] == value)) for value in (1, 2)] == [19, 19]
    assert np.sum(samples == PAD) == 2


def test_three_hundred_pairs_train_as_one(tmp_path):
    weights = {write_pair(tmp_path / f"{i:03d}", i): 1.0 for i in range(300)}
    train = build(DataConfig(train_path=weights))["train"]
    values = members_of(train, 600)
    assert sorted(values[:300]) == sorted(values[300:]) == list(range(300))


def test_a_pair_of_hardly_any_weight_gives_no_sample_and_no_error(tmp_path):
    weights = {write_pair(tmp_path / "a", 1): 1.0, write_pair(tmp_path / "b", 2): 1e-9}
    assert set(members_of(build(DataConfig(train_path=weights))["train"], 1000)) == {1}


def test_validation_sets_have_names(tmp_path):
    train, wiki, code = (write_pair(tmp_path / name, i) for i, name in enumerate("abc"))
    datasets = build(DataConfig(train_path=train, valid_sets={"wiki": wiki, "code": code}))
    assert list(datasets) == ["train", "valid-wiki", "valid-code"]
    assert members_of(datasets["valid-code"], 1) == [2]


def test_one_document_trains_and_leaves_the_other_splits_out(tmp_path):
    prefix = write_pair(tmp_path / "a", 1, documents=1)
    assert list(build(DataConfig(path=prefix))) == ["train"]


def test_pair_without_documents_is_explained(tmp_path):
    prefix = write_pair(tmp_path / "a", 1, documents=0)
    with pytest.raises(ValueError, match=r"train split is empty: .*/a holds no documents"):
        build(DataConfig(train_path=prefix))


def test_sizes_above_single_precision_lose_no_sample(tmp_path):
    # Megatron's float32 gives 16,384 samples here, see NVIDIA/Megatron-LM helpers.cpp.
    num_tokens, prefix = 33_554_435, tmp_path / "a"
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        writer.add_tokens(np.zeros(num_tokens, dtype=np.uint16))
        writer.add_lengths(np.array([num_tokens]), np.array([1]))
    dataset = GPTDataset(IndexedDataset(prefix), range(1), seq_length=2048, seed=0, shuffle=False)
    assert len(dataset) == 16_385
    assert int(np.sum(dataset[16_384] != PAD)) == 3


def test_token_outside_the_vocabulary_is_refused_by_the_name_of_its_file(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "to be or not to be"}\n')
    preprocess([source], tmp_path / "a", tokenizer_path="byte")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[10:12] = b"\xff\xff"
    (tmp_path / "a.bin").write_bytes(content)
    dataset = build(DataConfig(train_path=str(tmp_path / "a")))["train"]
    with pytest.raises(ValueError, match=r"a\.bin holds token 65535, the vocabulary ends at 256"):
        dataset.gather(range(len(dataset)))


def test_fingerprint_knows_weights_and_the_length_of_a_replayed_run(tmp_path):
    a, b = write_pair(tmp_path / "a", 1), write_pair(tmp_path / "b", 2)
    even, uneven = (DataConfig(train_path={a: 1.0, b: w}) for w in (1.0, 2.0))
    assert data_fingerprint(even) != data_fingerprint(uneven)
    ours, replayed = (
        DataConfig(train_path={a: 1.0, b: 1.0}, order=o) for o in ("epoch", "megatron")
    )
    assert data_fingerprint(ours, train_samples=8) == data_fingerprint(ours, train_samples=9)
    assert data_fingerprint(replayed, train_samples=8) != data_fingerprint(
        replayed, train_samples=9
    )


def test_replay_of_a_blend_needs_its_weights(tmp_path):
    paths = [write_pair(tmp_path / "a", 1), write_pair(tmp_path / "b", 2)]
    with pytest.raises(ValueError, match="order=megatron needs the weight of each pair"):
        build(DataConfig(train_path=paths, order="megatron"), train_samples=8)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "names no pair"),
        ([], "names no pair"),
        (["a", "a"], "names a pair twice"),
        ({"a": 0.0}, "the weight 0.0"),
        ({"a": float("nan")}, "the weight nan"),
        ({"a": -1.0, "b": 1.0}, "the weight -1.0"),
    ],
)
def test_blends_that_mean_nothing_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path=paths)


def test_one_pair_is_split_and_empty_splits_left_out_or_explained(tmp_path):
    prefix = str(tmp_path / "a")
    write_documents(prefix, [10] * 10)
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
    write_documents(paths["train"], [10] * 3)
    write_documents(paths["valid"], [5])
    data = DataConfig(train_path=paths["train"], valid_path=paths["valid"])
    datasets = build_datasets(data, seq_length=4, seed=0)
    assert {name: each.num_tokens for name, each in datasets.items()} == {"train": 30, "valid": 5}
    with pytest.raises(ValueError, match="no test data is named; give --data.test_path"):
        build_datasets(data, seq_length=4, seed=0, required=("test",))


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no data at .*x\.idx; .*megagpt preprocess"):
        build_datasets(DataConfig(path=str(tmp_path / "x")), seq_length=4, seed=0)
    with pytest.raises(ValueError, match="no data is named"):
        build_datasets(DataConfig(), seq_length=4, seed=0)


def test_pairs_of_different_tokenizers_are_refused(tmp_path):
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
        write_documents(prefix, lengths)
    one, same, other = (data_fingerprint(DataConfig(path=prefix)) for prefix in prefixes)
    assert one == same != other
    assert one != data_fingerprint(DataConfig(path=prefixes[0], split="1,1"))
    assert one["train"][0]["num_tokens"] == 9
