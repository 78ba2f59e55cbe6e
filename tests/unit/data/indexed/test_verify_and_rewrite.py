"""Damage is found to the block; merged, split and adopted pairs are whole pairs."""

import json

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset, manifest_path
from megagpt.data.indexed.manifest import read_manifest, write_manifest
from megagpt.data.indexed.rewrite import adopt, merge, split
from megagpt.data.indexed.verify import verify
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.preprocessing.preprocess import preprocess

TEXTS = [f"document {i} " + "words " * (i % 9) for i in range(40)]


@pytest.fixture
def pair(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess([source], tmp_path / "a", tokenizer_path="byte")
    return tmp_path / "a"


def change(path, place, value):
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)


def test_a_sound_pair_passes_with_and_without_its_manifest(pair):
    assert verify(pair) == read_manifest(pair)
    manifest_path(pair).unlink()
    assert verify(pair, vocab_size=257) is None


def test_every_changed_byte_of_bin_is_found_in_its_block(pair, monkeypatch):
    for module in ("writer", "verify"):
        monkeypatch.setattr(f"megagpt.data.indexed.{module}.CHECKSUM_BLOCK_BYTES", 1000)
    monkeypatch.setattr("megagpt.data.indexed.verify._STEP_BYTES", 250)
    preprocess([f"{pair}.jsonl"], pair, tokenizer_path="byte")
    tokens = pair.with_suffix(".bin")
    size = tokens.stat().st_size
    for place in range(0, size, 97):
        old = tokens.read_bytes()[place]
        change(tokens, place, old ^ 1)
        begin = place // 1000 * 1000
        with pytest.raises(ValueError, match=rf"a\.bin in bytes {begin} to .* has changed"):
            verify(pair)
        change(tokens, place, old)
    verify(pair)


def test_changed_index_is_found(pair):
    index = pair.with_suffix(".idx")
    content = index.read_bytes()
    for place in range(34, len(content), 13):
        change(index, place, content[place] ^ 1)
        with pytest.raises(ValueError, match=r"a\.idx"):
            verify(pair)
        index.write_bytes(content)


def test_token_outside_the_vocabulary_is_found_without_a_manifest(pair):
    manifest_path(pair).unlink()
    change(pair.with_suffix(".bin"), 7, 0xFF)
    verify(pair)
    with pytest.raises(ValueError, match=r"holds token 65\d+, which no vocabulary of 257 has"):
        verify(pair, vocab_size=257)


def test_split_and_merge_give_the_pair_back(pair, tmp_path):
    made = split(pair, "8,1,1", tmp_path / "part")
    assert {name: each.num_documents for name, each in made.items()} == {
        "train": 32,
        "valid": 4,
        "test": 4,
    }
    parts = [tmp_path / f"part_{name}" for name in made]
    for part in parts:
        verify(part)
    merge(parts, tmp_path / "whole")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"whole.{suffix}").read_bytes() == (
            tmp_path / f"a.{suffix}"
        ).read_bytes()
    verify(tmp_path / "whole")
    assert (
        read_manifest(tmp_path / "whole").tokenizer_sha256 == read_manifest(pair).tokenizer_sha256
    )


def test_merge_keeps_documents_of_several_sequences_and_none(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.dtype("int32")) as writer:
        writer.add_tokens(np.arange(7, dtype=np.int32))
        writer.add_lengths(np.array([3, 1, 3]), np.array([2, 0, 1]))
    merged = merge([tmp_path / "a", tmp_path / "a"], tmp_path / "b")
    documents = [merged.document(i).tolist() for i in range(merged.num_documents)]
    assert documents == [[0, 1, 2, 3], [], [4, 5, 6]] * 2
    assert merged.num_sequences == 6 and not manifest_path(tmp_path / "b").exists()


def test_pairs_that_do_not_fit_together_are_refused(pair, tmp_path):
    with IndexedDatasetWriter(tmp_path / "b", np.dtype("int32")) as writer:
        writer.add_document([1])
    with pytest.raises(ValueError, match=r"b stores int32, .*a uint16"):
        merge([pair, tmp_path / "b"], tmp_path / "c")
    with pytest.raises(ValueError, match="is an input too"):
        merge([pair], pair)
    with pytest.raises(ValueError, match=r"gives valid 0 of the 40 documents"):
        split(pair, "1,0.001", tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_adopted_pair_has_the_manifest_that_preprocessing_writes(pair):
    made = read_manifest(pair)
    manifest_path(pair).unlink()
    adopted = adopt(pair, "byte")
    assert adopted.bin_crc32 == made.bin_crc32 and adopted.idx_sha256 == made.idx_sha256
    assert (adopted.eod, adopted.largest_token) == (256, 256)
    assert verify(pair) == adopted
    with pytest.raises(ValueError, match="exists; remove it"):
        adopt(pair, "byte")


def test_pair_of_a_larger_vocabulary_is_not_adopted(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.dtype("uint16")) as writer:
        writer.add_document([5, 300])
    with pytest.raises(ValueError, match="holds token 300, which no vocabulary of 257 has"):
        adopt(tmp_path / "a", "byte")
    assert not manifest_path(tmp_path / "a").exists()


def test_manifest_that_says_other_counts_is_refused(pair):
    import dataclasses

    write_manifest(pair, dataclasses.replace(read_manifest(pair), num_documents=7))
    with pytest.raises(ValueError, match="says num_documents=7, the index has 40"):
        verify(pair)
    assert IndexedDataset(pair).num_documents == 40
