"""Files to pairs: the tokens of each document, the manifest, and bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.data.indexed_dataset import IndexedDataset
from megagpt.data.manifest import file_sha256, read_manifest
from megagpt.data.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[3]
TOOL = str(ROOT / "tools/preprocess_data.py")


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def encode(path, prefix, **options):
    return preprocess([path], prefix, tokenizer_path="byte", **options)


def test_each_line_is_a_document_ended_by_eod(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "", "ç\n<eod>", "  "])
    source.write_text(source.read_text() + "\n")
    manifest = encode(source, tmp_path / "out" / "a")
    read = IndexedDataset(tmp_path / "out" / "a")
    expected = [[*b"ab", 256], [*"ç\n<eod>".encode(), 256]]
    assert [read.document(i).tolist() for i in range(read.num_documents)] == expected
    assert manifest == read_manifest(tmp_path / "out" / "a")
    assert (manifest.num_tokens, manifest.num_documents, manifest.text_bytes) == (12, 2, 10)
    assert (manifest.vocab_size, manifest.eod, manifest.dtype) == (257, 256, "uint16")
    assert manifest.skipped == {"no text": 3}
    assert manifest.sources[0].sha256 == file_sha256(source)
    assert manifest.sources[0].num_bytes == source.stat().st_size


def test_text_files_are_one_document_each_without_their_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    preprocess([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", tokenizer_path="byte")
    read = IndexedDataset(tmp_path / "out")
    assert [bytes(read.document(i)[:-1].astype("u1")) for i in (0, 1)] == [
        b"one\n\ntwo\n",
        b"three",
    ]


def test_workers_do_not_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.documents.CHUNK_BYTES", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * (i % 40) for i in range(400)])
    encode(source, tmp_path / "one")
    encode(source, tmp_path / "two", workers=2)
    for suffix in ("bin", "idx", "manifest.json"):
        one, two = (tmp_path / f"{name}.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


BAD_LINE = {
    "invalid JSON": (b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: invalid JSON"),
    "no key": (b'{"text": "a"}\n{"body": "b"}\n', r'a.jsonl:2: no key "text" \(keys: body\)'),
    "null": (b'{"text": null}\n', r'a.jsonl:1: key "text" is NoneType'),
    "number": (b'\n{"text": 5}\n', r'a.jsonl:2: key "text" is int'),
    "list": (b"[1]\n", r"a.jsonl:1: list instead of a JSON object"),
    "deep": (b'{"text": ' + b"[" * 200_000 + b"\n", r"a.jsonl:1: invalid JSON"),
    "UTF-8": (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"a.jsonl:3: invalid UTF-8 \(byte 0xff\)"),
    "surrogate": (b'{"text": "\\ud800"}\n', r"a.jsonl:1: a lone surrogate"),
    "empty": (b"", r"a.jsonl holds no text"),
    "blank": (b'\n{"text": " "}\n', r"a.jsonl holds no text"),
}


@pytest.mark.parametrize("name", list(BAD_LINE))
def test_bad_input_is_one_line_with_its_place_and_leaves_nothing(tmp_path, name):
    content, message = BAD_LINE[name]
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        encode(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_bad_input_in_a_worker_is_reported_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.documents.CHUNK_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    source.write_text(source.read_text() + "bad\n" + source.read_text())
    with pytest.raises(ValueError, match=r"a.jsonl:51: invalid JSON"):
        encode(source, tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == [source]


def test_text_file_names_the_line_of_broken_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xe9\n")
    with pytest.raises(ValueError, match=r"a.txt:2: invalid UTF-8"):
        encode(tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.jsonl.gz", "unpack it"), ("a.dat", "give --format"), ("missing.txt", "is not a file")],
)
def test_files_that_are_not_read_are_refused_before_anything(tmp_path, name, message):
    if not name.startswith("missing"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / name, tmp_path / "out")


def test_manifest_refuses_files_of_another_size(tmp_path):
    encode(write_jsonl(tmp_path / "a.jsonl", ["abc"]), tmp_path / "out")
    with (tmp_path / "out.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"out.bin holds 10 bytes, out.manifest.json says 8"):
        read_manifest(tmp_path / "out")
    assert read_manifest(tmp_path / "nothing") is None
    (tmp_path / "out.manifest.json").write_text("{")
    with pytest.raises(ValueError, match="out.manifest.json is not JSON"):
        read_manifest(tmp_path / "out")


def test_manifest_finds_its_tokenizer_after_a_move(tmp_path):
    from megagpt.data.tokenizer import train_sentencepiece

    source = ROOT / "megagpt/data/preprocess.py"
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


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_command_exits_1_with_one_line(tmp_path):
    (tmp_path / "a.txt").touch()
    done = run_tool(
        "--input", tmp_path / "a.txt", "--output_prefix", tmp_path / "out", "--tokenizer", "byte"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: input {tmp_path / 'a.txt'} holds no text; give a file with text or leave it out"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_command_imports_no_torch(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{TOOL!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_terminated_command_leaves_nothing(tmp_path):
    source = tmp_path / "a.jsonl"
    with source.open("w") as file:
        line = json.dumps({"text": "some words to encode " * 500}) + "\n"
        for _ in range(3000):
            file.write(line)
    process = subprocess.Popen(
        [sys.executable, TOOL, "--input", str(source), "--output_prefix", str(tmp_path / "out")]
        + ["--tokenizer", "byte"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "out.bin.tmp").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [source]
