"""Workers change no byte, tell what is wrong in them, and end with their parent."""

import multiprocessing

import pytest
from encoding_jobs import encode, write_jsonl

from megagpt.data.tokenizers.byte import ByteTokenizer


def test_workers_do_not_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * (i % 40) for i in range(400)])
    encode(source, tmp_path / "one")
    encode(source, tmp_path / "two", workers=2)
    for suffix in ("bin", "idx", "manifest.json"):
        one, two = (tmp_path / f"{name}.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_bad_input_in_a_worker_is_reported_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    source.write_text(source.read_text() + "bad\n" + source.read_text())
    with pytest.raises(ValueError, match=r"a.jsonl:51: invalid JSON"):
        encode(source, tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("out.[bim]*"))


def test_killed_worker_ends_the_command_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 1 << 20)
    source = write_jsonl(tmp_path / "a.jsonl", ["some text " * 1000] * 3000)

    def kill_one(line):
        if line.startswith("encoded"):
            for child in multiprocessing.active_children():
                child.kill()

    monkeypatch.setattr("megagpt.data.preprocessing.progress._PROGRESS_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"one of workers=2 was killed"):
        encode(source, tmp_path / "out", workers=2, report=kill_one)
    assert not (tmp_path / "out.bin").exists()


def test_tokenizer_that_fails_in_a_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    monkeypatch.setattr(ByteTokenizer, "path", "gone.model")
    with pytest.raises(ValueError, match=r"no tokenizer at gone.model"):
        encode(source, tmp_path / "out", workers=2)
