"""The manifest of a pair knows other files, and finds its tokenizer after a move."""

from pathlib import Path

import pytest

from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece

ROOT = Path(__file__).resolve().parents[4]


def test_manifest_refuses_files_of_another_size(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", tokenizer_path="byte")
    with (tmp_path / "out.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"out.bin holds 10 bytes, out.manifest.json says 8"):
        read_manifest(tmp_path / "out")
    assert read_manifest(tmp_path / "nothing") is None
    (tmp_path / "out.manifest.json").write_text("{")
    with pytest.raises(ValueError, match="out.manifest.json is not JSON"):
        read_manifest(tmp_path / "out")


def test_manifest_finds_its_tokenizer_after_a_move(tmp_path):
    source = ROOT / "megagpt/data/preprocessing/documents.py"
    (tmp_path / "data").mkdir()
    train_sentencepiece(iter([source.read_text()]), tmp_path / "data/t.model", vocab_size=400)
    preprocess(
        [source],
        tmp_path / "data/out",
        tokenizer_path=tmp_path / "data/t.model",
        file_format="text",
    )
    (tmp_path / "data").rename(tmp_path / "moved")
    manifest = read_manifest(tmp_path / "moved/out")
    assert manifest is not None
    assert Path(manifest.tokenizer_path) == tmp_path / "moved/t.model"
