"""Whenever a job ends there is no pair or a whole one, and the same command goes on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from encoding_jobs import COMMAND, ROOT, encode, run_tool, write_jsonl

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.indexed.verify import verify


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
    skip = {"on_error": "skip", "largest_skipped_share": 1.0}
    assert encode(source, tmp_path / "out", **skip, report=said.append).num_documents == 50
    assert any(line.startswith("going on from") for line in said)
    with pytest.raises(ValueError, match="a.jsonl:51"):
        encode(source, tmp_path / "out")
    write_jsonl(source, ["other"] * 3)
    said.clear()
    assert encode(source, tmp_path / "out", report=said.append).num_documents == 3
    assert any(line.startswith("starting anew") for line in said)


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
    monkeypatch.setattr("megagpt.data.preprocessing.progress._PROGRESS_SECONDS", 0.0)
    source = write_jsonl(tmp_path / "a.jsonl", ["good text"] * 50)

    def grow(line):
        if line.startswith("encoded"):
            with source.open("a") as file:
                file.write('{"text": "late"}\n')

    with pytest.raises(ValueError, match="an input changed while it was read"):
        encode(source, tmp_path / "out", report=grow)
    assert not list(tmp_path.glob("out.[bim]*"))
