"""The pair is Megatron's byte for byte; damage is found on opening; writing is all or nothing."""

import hashlib
import struct
import zlib

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset, token_dtype
from megagpt.data.indexed.writer import IndexedDatasetWriter

DOCUMENTS = [[5, 6, 7], [300], [65535, 0]]

# By hand from megatron/core/datasets/indexed_dataset.py: header, lengths, pointers, documents.
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + b"\x01\x00\x00\x00\x00\x00\x00\x00"
    + b"\x08"
    + b"\x03\x00\x00\x00\x00\x00\x00\x00"
    + b"\x04\x00\x00\x00\x00\x00\x00\x00"
    + struct.pack("<3i", 3, 1, 2)
    + struct.pack("<3q", 0, 6, 8)
    + struct.pack("<4q", 0, 1, 2, 3)
)
GOLDEN_BIN = b"\x05\x00\x06\x00\x07\x00\x2c\x01\xff\xff\x00\x00"


def write(prefix, documents, dtype="uint16"):
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)


def test_golden_bytes(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_round_trip_in_every_dtype(tmp_path, dtype):
    documents = [[1, 2, 3], [], [127], [4, 5]]
    write(tmp_path / "a", documents, dtype)
    read = IndexedDataset(tmp_path / "a")
    assert read.dtype == np.dtype(dtype)
    assert [read.document(i).tolist() for i in range(read.num_documents)] == documents
    assert [read[i].tolist() for i in range(read.num_sequences)] == [[1, 2, 3], [127], [4, 5]]
    assert read.document_offsets().tolist() == [0, 3, 3, 4, 6]
    assert read.num_tokens == 6


def test_documents_of_several_sequences_as_megatron_writes_them(tmp_path):
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    two_documents = struct.pack("<QQ", 3, 3) + GOLDEN_IDX[34:70] + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "a.idx").write_bytes(GOLDEN_IDX[:18] + two_documents)
    read = IndexedDataset(tmp_path / "a")
    assert read.document(0).tolist() == [5, 6, 7, 300]
    assert read.document_offsets().tolist() == [0, 4, 6]


def test_no_documents(tmp_path):
    write(tmp_path / "a", [])
    read = IndexedDataset(tmp_path / "a")
    assert (read.num_tokens, read.num_documents, read.num_sequences) == (0, 0, 0)


def test_type_is_megatrons_for_the_vocabulary():
    assert token_dtype(257) == token_dtype(65_499) == np.dtype("uint16")
    assert token_dtype(65_500) == token_dtype(128_256) == np.dtype("int32")


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"", GOLDEN_BIN, "a.idx is not an MMIDIDX index"),
        (b"X" + GOLDEN_IDX[1:], GOLDEN_BIN, "a.idx is not an MMIDIDX index"),
        (GOLDEN_IDX[:9] + b"\x02" + GOLDEN_IDX[10:], GOLDEN_BIN, "version 2"),
        (GOLDEN_IDX[:17] + b"\x06" + GOLDEN_IDX[18:], GOLDEN_BIN, "dtype code 6"),
        (GOLDEN_IDX[:-1], GOLDEN_BIN, "a.idx holds 101 bytes, its header says 102"),
        (GOLDEN_IDX + b"\0", GOLDEN_BIN, "a.idx holds 103 bytes, its header says 102"),
        (GOLDEN_IDX, GOLDEN_BIN[:6], "a.bin holds 6 bytes, a.idx describes 12"),
        (GOLDEN_IDX[:-8] + struct.pack("<q", 2), GOLDEN_BIN, "over sequences 0 to 2 of 3"),
    ],
)
def test_damage_is_refused_on_opening(tmp_path, index, tokens, message):
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(tokens)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert "megagpt preprocess" in str(caught.value)


def test_damaged_pointers_are_refused_before_any_sample(tmp_path):
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "a.idx").write_bytes(GOLDEN_IDX[:54] + struct.pack("<q", 2) + GOLDEN_IDX[62:])
    with pytest.raises(ValueError, match="damaged"):
        IndexedDataset(tmp_path / "a").document_offsets()


def test_missing_pair_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"no data at .*a\.idx; .*megagpt preprocess .*make demo"):
        IndexedDataset(tmp_path / "a")


def test_failure_keeps_the_older_pair_and_leaves_nothing_else(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match="token 65536 does not fit uint16"):
        write(tmp_path / "a", [[1], [65536]])
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert len(list(tmp_path.iterdir())) == 2


def test_rewriting_removes_the_old_manifest_and_what_a_killed_run_left(tmp_path):
    (tmp_path / "a.manifest.json").write_text("{}")
    (tmp_path / "a.partial").mkdir()
    for name in ("tokens", "lengths", "counts"):
        (tmp_path / "a.partial" / name).write_bytes(b"left by a killed run")
    write(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("rewound", [False, True])
def test_checksums_are_of_each_block_of_bin_and_the_hash_is_of_idx(tmp_path, monkeypatch, rewound):
    monkeypatch.setattr("megagpt.data.indexed.writer.CHECKSUM_BLOCK_BYTES", 10)
    documents = [[1, 2, 3], [4] * 9, [], [5, 65_000]]
    writer = IndexedDatasetWriter(tmp_path / "a", np.dtype("uint16"))
    for document in documents[:2]:
        writer.add_document(document)
    if rewound:
        state, blocks = writer.state, list(writer.bin_crc32)
        writer.add_document([7] * 100)
        writer.close()
        writer = IndexedDatasetWriter(tmp_path / "a", np.dtype("uint16"), resume=True)
        writer.rewind(state, blocks)
    for document in documents[2:]:
        writer.add_document(document)
    writer.seal()
    writer.publish()
    content = (tmp_path / "a.bin").read_bytes()
    assert writer.bin_crc32 == [zlib.crc32(content[i : i + 10]) for i in range(0, 28, 10)]
    assert writer.idx_sha256 == hashlib.sha256((tmp_path / "a.idx").read_bytes()).hexdigest()
    assert (writer.largest_token, writer.num_tokens, writer.num_documents) == (65_000, 14, 4)
    read = IndexedDataset(tmp_path / "a")
    assert [read.document(i).tolist() for i in range(4)] == documents


def test_index_of_many_documents_is_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.indexed.writer._READ_ITEMS", 3)
    documents = [[i] * (i % 4) for i in range(20)]
    write(tmp_path / "a", documents)
    read = IndexedDataset(tmp_path / "a")
    assert [read.document(i).tolist() for i in range(20)] == documents
    read.require_sound()


def test_two_writers_of_one_pair_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.dtype("uint16")) as writer:
        with pytest.raises(ValueError, match="another process"):
            IndexedDatasetWriter(tmp_path / "a", np.dtype("uint16"))
        writer.add_document([1])
    assert IndexedDataset(tmp_path / "a").num_tokens == 1
