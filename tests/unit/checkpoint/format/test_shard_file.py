"""One file: what safetensors reads of it, its hashes, failing writes, and files that are not it."""

import json
import os

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from megagpt.checkpoint.format.shard_file import (
    BLOCK_BYTES,
    DamagedCheckpoint,
    FileRecord,
    ShardReader,
    ShardWriter,
)


def arrays(num_elements=300):
    values = np.random.default_rng(1).standard_normal(num_elements).astype(np.float32)
    return {
        "state": np.arange(11, dtype=np.uint8),
        "matrix": values[: num_elements // 2 * 2].reshape(2, -1),
        "vector": values[:5],
        "scalar": values[:1],
    }


def write(path, tensors):
    writer = ShardWriter(path, {name: (v.shape, v.dtype) for name, v in tensors.items()})
    try:
        for values in tensors.values():
            writer.write(values)
        return writer.close()
    finally:
        writer.abandon()


def hashes(content, block_bytes):
    blocks = [content[i : i + block_bytes] for i in range(0, len(content), block_bytes)]
    return FileRecord(len(content), tuple(map(xxhash.xxh3_128_hexdigest, blocks)))


def num_open_files():
    return len(os.listdir("/proc/self/fd"))


def test_safetensors_opens_what_was_written(tmp_path, small_blocks):
    tensors = arrays()
    record = write(tmp_path / "a", tensors)
    loaded = load_file(tmp_path / "a")
    assert set(loaded) == set(tensors)
    for name, values in tensors.items():
        assert loaded[name].dtype == values.dtype
        np.testing.assert_array_equal(loaded[name], values)
    assert record == hashes((tmp_path / "a").read_bytes(), small_blocks)


def test_large_file_has_a_hash_for_each_block(tmp_path):
    tensors = arrays(BLOCK_BYTES // 2)  # 16 MiB, so three blocks with the header
    before = num_open_files()
    record = write(tmp_path / "a", tensors)
    assert len(record.block_hashes) == 3
    assert record == hashes((tmp_path / "a").read_bytes(), BLOCK_BYTES)
    reader = ShardReader(tmp_path / "a", record)
    for name, values in tensors.items():
        np.testing.assert_array_equal(reader.read(name), values.reshape(-1))
    assert list(reader.damages()) == []
    reader.close()
    assert num_open_files() == before


@pytest.mark.parametrize("extra", [0, -1, 1])
def test_file_that_ends_at_a_block(tmp_path, small_blocks, extra):
    header = len(json.dumps({"a": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}))
    header = 8 + header + -header % 8
    size = 3 * small_blocks - header + extra
    record = write(tmp_path / "a", {"a": np.arange(size, dtype=np.uint8)})
    assert record == hashes((tmp_path / "a").read_bytes(), small_blocks)
    reader = ShardReader(tmp_path / "a", record)
    np.testing.assert_array_equal(reader.read("a"), np.arange(size, dtype=np.uint8))
    reader.close()


def test_any_range_of_a_tensor_is_read(tmp_path, small_blocks):
    tensors = arrays()
    reader = ShardReader(tmp_path / "a", write(tmp_path / "a", tensors))
    flat = tensors["matrix"].reshape(-1)
    for first in range(0, flat.size, 7):
        for size in (1, 31, 32, 33, 64, 100):
            target = np.empty(min(size, flat.size - first), np.float32)
            reader.read_into("matrix", first, target)
            np.testing.assert_array_equal(target, flat[first : first + size])
    with pytest.raises(DamagedCheckpoint, match="matrix is shorter than its manifest says"):
        reader.read_into("matrix", flat.size - 1, np.empty(2, np.float32))
    with pytest.raises(DamagedCheckpoint, match="of another type"):
        reader.read_into("state", 0, np.empty(1, np.float32))
    with pytest.raises(DamagedCheckpoint, match="has no tensor other"):
        reader.read_into("other", 0, np.empty(1, np.float32))
    assert reader.read("other") is None
    reader.close()


def test_memory_may_change_after_a_write(tmp_path, small_blocks):
    values = np.zeros(1000, np.float32)
    writer = ShardWriter(tmp_path / "a", {n: (values.shape, values.dtype) for n in "ab"})
    for number in (1, 2):
        values[:] = number
        writer.write(values)
    record = writer.close()
    assert record == hashes((tmp_path / "a").read_bytes(), small_blocks)
    assert (load_file(tmp_path / "a")["a"] == 1).all()


def test_existing_file_is_not_written_over(tmp_path):
    (tmp_path / "a").write_text("kept")
    before = num_open_files()
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", arrays())
    assert (tmp_path / "a").read_text() == "kept" and num_open_files() == before


def test_short_writes_are_continued(tmp_path, monkeypatch, small_blocks):
    write_all = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write_all(descriptor, data[:7]))
        record = write(tmp_path / "a", arrays())
    assert record == hashes((tmp_path / "a").read_bytes(), small_blocks)
    np.testing.assert_array_equal(load_file(tmp_path / "a")["matrix"], arrays()["matrix"])


@pytest.mark.parametrize("failing", ["first write", "third write", "nothing written"])
def test_failing_write_leaves_no_descriptor(tmp_path, monkeypatch, failing):
    write_all, num_writes = os.write, 0

    def fail(*_):
        raise OSError(28, "No space left on device")

    def write_some(descriptor, data):
        nonlocal num_writes
        num_writes += 1
        if num_writes == {"first write": 1, "third write": 3}.get(failing):
            fail()
        return 0 if failing == "nothing written" else write_all(descriptor, data)

    before = num_open_files()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space|nothing was"):
        patch.setattr(os, "write", write_some)
        write(tmp_path / "a", arrays())
    assert num_open_files() == before


def test_failing_fsync_is_told_and_leaves_no_descriptor(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    before = num_open_files()
    writer = ShardWriter(tmp_path / "a", {"a": ((1 << 17,), np.dtype(np.float32))})
    writer.write(np.zeros(1 << 17, np.float32))
    assert num_open_files() == before + 1
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "fsync", fail)
        writer.close()
    assert num_open_files() == before


def test_close_refuses_a_file_with_less_than_its_header_promises(tmp_path):
    writer = ShardWriter(tmp_path / "a", {"a": ((4,), np.dtype(np.float32))})
    writer.write(np.zeros(3, np.float32))
    with pytest.raises(AssertionError):
        writer.close()
    writer.abandon()


@pytest.mark.parametrize("keep", ["none", "half", "all but one byte", "one byte more"])
def test_file_of_another_length_is_refused(tmp_path, keep):
    record = write(tmp_path / "a", arrays())
    size = record.num_bytes
    sizes = {"none": 0, "half": size // 2, "all but one byte": size - 1, "one byte more": size + 1}
    os.truncate(tmp_path / "a", sizes[keep])
    before = num_open_files()
    with pytest.raises(DamagedCheckpoint, match=f"a has {sizes[keep]:,} bytes, .* {size:,}"):
        ShardReader(tmp_path / "a", record)
    assert num_open_files() == before


def test_file_that_is_cut_while_open_is_refused(tmp_path, small_blocks):
    reader = ShardReader(tmp_path / "a", write(tmp_path / "a", arrays()))
    os.truncate(tmp_path / "a", 700)
    with pytest.raises(DamagedCheckpoint, match="ends early, at byte 700"):
        reader.read("matrix")
    reader.close()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path}/a is missing"):
        ShardReader(tmp_path / "a", FileRecord(8, ("",)))


def test_damage_is_told_by_block_and_the_other_blocks_are_read(tmp_path, small_blocks):
    tensors = arrays()
    record = write(tmp_path / "a", tensors)
    content = bytearray((tmp_path / "a").read_bytes())
    for position in (4 * small_blocks, 7 * small_blocks - 1):
        content[position] ^= 1
    (tmp_path / "a").write_bytes(content)
    reader = ShardReader(tmp_path / "a", record)
    assert [line.split("damaged: ")[1].split(" are")[0] for line in reader.damages()] == [
        "bytes 512 to 640",
        "bytes 768 to 896",
    ]
    with pytest.raises(DamagedCheckpoint, match="bytes 512 to 640 are not those"):
        reader.read("matrix")
    target = np.empty(32, np.float32)
    reader.read_into("matrix", 290 - 32, target)
    np.testing.assert_array_equal(target, tensors["matrix"].reshape(-1)[290 - 32 : 290])
    reader.close()


def lying(header, size=64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def entry(dtype="F32", offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": [4], "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 40).to_bytes(8, "little") + bytes(64),
        lying(b"\x80"),
        lying(b"[" * 100_000),
        lying(["a"]),
        lying({"a": 1}),
        lying({"a": {"dtype": "F32"}}),
        lying(entry(dtype="F64")),
        lying(entry(dtype=["F32"])),
        lying(entry(offsets=(0, 1 << 30))),
        lying(entry(offsets=(-100, 16))),
        lying(entry(offsets=(16, 0))),
        lying(entry(offsets=(0, 8, 16))),
        lying(entry(offsets=(0, float("inf")))),
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_header_that_lies_is_refused_though_its_hash_is_right(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    reader = ShardReader(tmp_path / "a", hashes(content, BLOCK_BYTES))
    with pytest.raises(DamagedCheckpoint, match="a is not a safetensors file"):
        reader.read("a")
    reader.close()


def test_record_without_a_hash_for_every_block_is_refused(tmp_path, small_blocks):
    record = write(tmp_path / "a", arrays())
    for blocks in (record.block_hashes[:-1], (*record.block_hashes, "0" * 32), ()):
        with pytest.raises(DamagedCheckpoint, match="has not a hash for every block"):
            ShardReader(tmp_path / "a", FileRecord(record.num_bytes, blocks))
