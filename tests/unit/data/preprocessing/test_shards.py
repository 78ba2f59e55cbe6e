"""Wherever the cuts fall, every document is in one shard and keeps its line number."""

from pathlib import Path

import pytest
from encoding_jobs import encode, write_jsonl

from megagpt.data.indexed.dataset import IndexedDataset


def test_every_line_is_in_one_shard_wherever_the_cuts_fall(tmp_path, monkeypatch):
    texts = ["x" * (i % 7) + f"{i}" for i in range(15)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.write_bytes(source.read_bytes().rstrip(b"\n"))  # the last line has no end
    for size in (1, 7, 18, 19, 20, 10_000):
        monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", size)
        encode(source, tmp_path / "out")
        read = IndexedDataset(tmp_path / "out")
        found = [
            bytes(read.document(i)[:-1].astype("u1")).decode() for i in range(read.num_documents)
        ]
        assert found == texts


def test_many_small_files_share_a_shard_and_each_keeps_its_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    for number in range(30):
        write_jsonl(tmp_path / f"{number:02d}.jsonl", ["some text", "more"])
    manifest = encode(tmp_path / "*.jsonl", tmp_path / "out", workers=2)
    assert manifest.num_documents == 60
    assert [Path(source.path).name for source in manifest.sources] == [
        f"{number:02d}.jsonl" for number in range(30)
    ]
    (tmp_path / "17.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(ValueError, match=r"17.jsonl:2: invalid JSON"):
        encode(tmp_path / "*.jsonl", tmp_path / "other")
