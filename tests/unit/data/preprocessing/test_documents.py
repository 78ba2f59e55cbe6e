"""Files to documents: plain and packed, and what is wrong in one line with its place."""

import gzip
import random

import pytest
import zstandard
from encoding_jobs import encode, write_jsonl

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.preprocessing.preprocess import preprocess


def test_text_files_are_one_document_each_without_their_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    preprocess([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", tokenizer_path="byte")
    read = IndexedDataset(tmp_path / "out")
    assert [bytes(read.document(i)[:-1].astype("u1")) for i in (0, 1)] == [
        b"one\n\ntwo\n",
        b"three",
    ]


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
