"""Files to pairs: the tokens of each document, the manifest, and the command."""

import os
import subprocess
import sys

from encoding_jobs import ROOT, encode, run_tool, write_jsonl

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.files import file_sha256


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


def test_one_document_of_two_megabytes(tmp_path):
    text = "long " * 400_000
    encode(write_jsonl(tmp_path / "a.jsonl", [text, "short"]), tmp_path / "out", workers=2)
    read = IndexedDataset(tmp_path / "out")
    assert len(read.document(0)) == len(text) + 1 and len(read.document(1)) == 6


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
