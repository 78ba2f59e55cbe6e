"""Files to pairs: the tokens of each document, the manifest, and bad input in one line."""

import gzip
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.indexed.verify import verify
from megagpt.data.preprocessing.preprocess import FaultPolicy, preprocess
from megagpt.data.tokenizers.tokenizer import ByteTokenizer
from megagpt.files import file_sha256

ROOT = Path(__file__).resolve().parents[4]
COMMAND = [sys.executable, "-m", "megagpt", "preprocess"]


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
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 2000)
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
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    source.write_text(source.read_text() + "bad\n" + source.read_text())
    with pytest.raises(ValueError, match=r"a.jsonl:51: invalid JSON"):
        encode(source, tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("out.[bim]*"))


def test_text_file_names_the_line_of_broken_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xe9\n")
    with pytest.raises(ValueError, match=r"a.txt:2: invalid UTF-8"):
        encode(tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", "is parquet, which is not read"),
        ("a.jsonl.bz2", "is bz2, which is not read"),
        ("a.dat", "give --format"),
        ("missing.txt", "is not a file"),
        ("missing*.txt", "is not a file"),
    ],
)
def test_files_that_are_not_read_are_refused_before_anything(tmp_path, name, message):
    if not name.startswith("missing"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / name, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def pack(path, packing):
    content = path.read_bytes()
    packed = path.with_name(path.name + packing)
    # Two frames, as parallel packers write them.
    half = len(content) // 2
    compress = gzip.compress if packing == ".gz" else zstandard.ZstdCompressor().compress
    packed.write_bytes(compress(content[:half]) + compress(content[half:]))
    path.unlink()
    return packed


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_give_the_same_pair(tmp_path, packing):
    texts = [f"document {i} " * (i % 40) for i in range(200)]
    encode(write_jsonl(tmp_path / "plain.jsonl", texts), tmp_path / "one")
    encode(pack(write_jsonl(tmp_path / "a.jsonl", texts), packing), tmp_path / "two", workers=2)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (
            tmp_path / f"two.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_packed_files_are_named(tmp_path, packing, damage):
    words = random.Random(0).choices("to be or not that is the question".split(), k=20_000)
    packed = pack(write_jsonl(tmp_path / "a.jsonl", [" ".join(words)] * 2), packing)
    content = bytearray(packed.read_bytes())
    if damage == "cut":
        del content[-20:]
    else:
        content[len(content) // 4] ^= 0xFF
        content[len(content) // 3] ^= 0xFF
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.jsonl{packing} is cut off or damaged|a.jsonl.*:1: "):
        encode(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [packed]


def test_globs_are_read_in_order_of_name_and_no_file_twice(tmp_path):
    for name in "cab":
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    encode(tmp_path / "*.jsonl", tmp_path / "out")
    read = IndexedDataset(tmp_path / "out")
    assert [chr(read.document(i)[0]) for i in range(3)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="b.jsonl is named twice"):
        preprocess(
            [tmp_path / "*.jsonl", tmp_path / "b.jsonl"], tmp_path / "x", tokenizer_path="byte"
        )


def test_every_line_is_in_one_shard_wherever_the_cuts_fall(tmp_path, monkeypatch):
    texts = ["x" * (i % 7) + f"{i}" for i in range(15)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.write_bytes(source.read_bytes().rstrip(b"\n"))  # the last line has no end
    for size in (1, 7, 18, 19, 20, 10_000):
        monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", size)
        encode(source, tmp_path / "out")
        read = IndexedDataset(tmp_path / "out")
        found = [bytes(read.document(i)[:-1].astype("u1")).decode() for i in range(len(read))]
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


def test_skip_leaves_bad_documents_out_and_counts_them_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 200)
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(60)]
    bad = [b"{", b'{"body": 1}', b'{"text": 1}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[]"]
    lines = good[:30] + bad + [b'{"text": ""}'] + good[30:]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines))
    said: list[str] = []
    policy = FaultPolicy("skip", largest_skipped_share=0.1)
    manifest = encode(source, tmp_path / "out", faults=policy, report=said.append)
    assert manifest.num_documents == 60
    assert manifest.skipped == {
        "invalid JSON": 1,
        'no key "text"': 1,
        "no string": 1,
        "lone surrogate": 1,
        "invalid UTF-8": 1,
        "no JSON object": 1,
        "no text": 1,
    }
    places = [line for line in said if line.startswith("left out:")]
    assert len(places) == 6 and f"{source}:31: invalid JSON" in places[0]
    assert f"{source}:36: list instead" in places[-1]
    with pytest.raises(ValueError, match=r"6 of 66 documents are bad .*allowed is a share of 0.05"):
        encode(source, tmp_path / "other", faults=FaultPolicy("skip", 0.05))
    assert not list(tmp_path.glob("other.bin"))


def test_all_documents_empty_is_an_error_under_skip_too(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(ValueError, match="the input holds no text"):
        encode(source, tmp_path / "out", faults=FaultPolicy("skip"))
    assert list(tmp_path.iterdir()) == [source]


def test_one_document_of_two_megabytes(tmp_path):
    text = "long " * 400_000
    encode(write_jsonl(tmp_path / "a.jsonl", [text, "short"]), tmp_path / "out", workers=2)
    read = IndexedDataset(tmp_path / "out")
    assert len(read.document(0)) == len(text) + 1 and len(read.document(1)) == 6


def test_failed_write_is_one_line_and_the_older_pair_stays(tmp_path):
    # A limit on the size of files stands for a full disk: write() fails in the same way.
    encode(write_jsonl(tmp_path / "old.jsonl", ["old"]), tmp_path / "out")
    before = (tmp_path / "out.bin").read_bytes()
    source = write_jsonl(tmp_path / "a.jsonl", ["some text " * 100] * 3000)
    command = f"ulimit -f 1000; exec {shlex.join(COMMAND)} --input {source} --tokenizer byte"
    done = subprocess.run(
        ["bash", "-c", f"{command} --output_prefix {tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out.bin").read_bytes() == before
    assert read_manifest(tmp_path / "out") is not None
    assert not (tmp_path / "out.partial").exists()


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
    from megagpt.data.tokenizers.tokenizer import train_sentencepiece

    source = ROOT / "megagpt/data/preprocessing/preprocess.py"
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
        [*COMMAND, *map(str, arguments)],
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
        "import sys\n"
        "from megagpt.commands import main\n"
        "try:\n    main(['preprocess', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_ended_command_leaves_no_pair_and_goes_on_where_it_was(tmp_path, number, workers):
    source = tmp_path / "a.jsonl"
    texts = [f"{i} " + "some words to encode " * 500 for i in range(8000)]
    write_jsonl(source, texts)
    arguments = ["--input", source, "--output_prefix", tmp_path / "out", "--tokenizer", "byte"]
    command = [*COMMAND, *map(str, arguments), "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if journal.exists() and len(journal.read_text().splitlines()) > 2:
            break
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(timeout=30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    while _session_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _session_lives(process.pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.partial"]
    num_done = len(journal.read_text().splitlines()) - 1
    assert 2 <= num_done < 6
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"going on from {tmp_path / 'out.partial'}: {num_done} of 6 shards" in done.stderr
    encode(source, tmp_path / "straight")
    for suffix in ("bin", "idx", "manifest.json"):
        ended, straight = (tmp_path / f"{name}.{suffix}" for name in ("out", "straight"))
        assert ended.read_bytes() == straight.read_bytes()
    assert not (tmp_path / "out.partial").exists()


def _session_lives(leader):
    """Whether a process of the session is there that is not about to be reaped."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            return True
    return False


def test_changed_input_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    source.write_text(source.read_text() + "bad\n")
    said: list[str] = []
    with pytest.raises(ValueError, match="a.jsonl:51"):
        encode(source, tmp_path / "out", report=said.append)
    assert "the same command goes on from there" in said[-1]
    # Skipping is no other job; other text is.
    policy = FaultPolicy("skip", 1.0)
    assert encode(source, tmp_path / "out", faults=policy, report=said.append).num_documents == 50
    assert any(line.startswith("going on from") for line in said)
    with pytest.raises(ValueError, match="a.jsonl:51"):
        encode(source, tmp_path / "out")
    write_jsonl(source, ["other"] * 3)
    said.clear()
    assert encode(source, tmp_path / "out", report=said.append).num_documents == 3
    assert any(line.startswith("starting anew") for line in said)


def test_killed_worker_ends_the_command_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 1 << 20)
    source = write_jsonl(tmp_path / "a.jsonl", ["some text " * 1000] * 3000)

    def kill_one(line):
        if line.startswith("encoded"):
            for child in multiprocessing.active_children():
                child.kill()

    monkeypatch.setattr("megagpt.data.preprocessing.preprocess._PROGRESS_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"one of workers=2 was killed"):
        encode(source, tmp_path / "out", workers=2, report=kill_one)
    assert not (tmp_path / "out.bin").exists()


def test_tokenizer_that_fails_in_a_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)
    monkeypatch.setattr(ByteTokenizer, "path", "gone.model")
    with pytest.raises(ValueError, match=r"no tokenizer at gone.model"):
        encode(source, tmp_path / "out", workers=2)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_kill_while_the_pair_is_put_in_place_leaves_no_pair_or_all_of_it(tmp_path, stage):
    """The four renames and unlinks of `publish`, each of them the process's last."""
    source = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 20)
    code = (
        "import os, pathlib, sys\n"
        "from megagpt.data.preprocessing.preprocess import preprocess\n"
        "left = [int(sys.argv[3])]\n"
        "def killing(real):\n"
        "    def call(path, *arguments, **options):\n"
        "        if str(path).endswith(('.idx', '.tmp%d' % os.getpid(), 'tokens', 'index')):\n"
        "            if left[0] == 0:\n"
        "                os._exit(9)\n"
        "            left[0] -= 1\n"
        "        return real(path, *arguments, **options)\n"
        "    return call\n"
        "import megagpt.data.indexed.writer as writer\n"
        "real = writer.IndexedDatasetWriter.publish\n"
        "def publish(self, sidecar=None):\n"
        "    for name in ('rename', 'replace', 'unlink'):\n"
        "        setattr(pathlib.Path, name, killing(getattr(pathlib.Path, name)))\n"
        "    real(self, sidecar)\n"
        "writer.IndexedDatasetWriter.publish = publish\n"
        "preprocess([sys.argv[1]], sys.argv[2], tokenizer_path='byte')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out"), str(stage)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 9
    with pytest.raises(ValueError, match="no data at"):
        IndexedDataset(tmp_path / "out")
    said: list[str] = []
    encode(source, tmp_path / "out", report=said.append)
    assert read_manifest(tmp_path / "out").num_documents == 20
    assert not (tmp_path / "out.partial").exists()
    verify(tmp_path / "out")


def test_input_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 100)
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess._PROGRESS_SECONDS", 0.0)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)

    def grow(line):
        if line.startswith("encoded"):
            with source.open("a") as file:
                file.write('{"text": "late"}\n')

    with pytest.raises(ValueError, match="an input changed while it was read"):
        encode(source, tmp_path / "out", report=grow)
    assert not list(tmp_path.glob("out.[bim]*"))
