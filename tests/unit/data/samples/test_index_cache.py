"""Cached sample indices: equal to built ones, never stale, rebuilt where damaged, built once."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.samples import index_cache
from megagpt.data.samples.gpt_dataset import GPTDataset, MegatronOrder
from megagpt.data.samples.index_cache import cached_index
from megagpt.data.samples.order import SampleIndex, epoch_index

ROOT = Path(__file__).resolve().parents[4]
ARRAYS = ["sequences", "order", "marks"]


@pytest.fixture(autouse=True)
def cache_small_indices(monkeypatch):
    monkeypatch.setattr(index_cache, "SMALLEST_CACHED_BYTES", 0)


def write_pair(prefix, lengths):
    begin = 0
    with IndexedDatasetWriter(prefix, np.dtype("<i4")) as writer:
        for length in lengths:
            writer.add_document(np.arange(begin, begin + length))
            begin += length


@pytest.fixture
def prefix(tmp_path):
    write_pair(tmp_path / "a", range(1, 40))
    return tmp_path / "a"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def build(prefix, cache, seed=1, **options):
    indexed = IndexedDataset(prefix)
    documents = options.pop("documents", range(indexed.num_documents))
    options = {"seq_length": 5, "seed": seed, "cache": cache, **options}
    return GPTDataset(indexed, documents, **options)


def epochs(dataset, count=1):
    return dataset.gather(range(count * len(dataset))).tolist()


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


def some_index():
    sequences, order, marks = (np.arange(size, dtype=np.uint32) for size in (30, 100, 14))
    return SampleIndex(sequences, order, marks.reshape(7, 2))


def get(cache, build):
    return cached_index(cache, {"data": "a"}, build, num_bytes=1)


def never():
    raise AssertionError("built although it is in the cache")


def assert_equal(one, other):
    for name in ARRAYS:
        assert getattr(one, name).dtype == np.uint32
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def count_builds(monkeypatch):
    built = []
    monkeypatch.setattr(
        "megagpt.data.samples.gpt_dataset.epoch_index",
        lambda *args, **options: built.append(options["epoch"]) or epoch_index(*args, **options),
    )
    return built


def test_a_cached_index_is_the_built_one_and_not_built_again(prefix, cache, monkeypatch):
    built = count_builds(monkeypatch)
    wanted = epochs(build(prefix, None), 3)
    assert epochs(build(prefix, cache), 3) == wanted
    del built[:]
    again = build(prefix, cache)
    assert epochs(again, 3) == wanted and built == []
    assert all(isinstance(index.order, np.memmap) for index in again._epochs.values())
    assert len(entries(cache)) == 3
    key = json.loads((entries(cache)[0] / "key.json").read_text())
    assert key["seed"] == 1 and key["seq_length"] == 5 and key["epoch"] in (0, 1, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"seq_length": 6},
        {"shuffle": False},
        {"documents": range(1, 39)},
        {"documents": range(0, 38)},
        {"megatron": MegatronOrder(range(39), 100)},
        {"megatron": MegatronOrder(range(39), 200)},
        {"megatron": MegatronOrder(range(38), 150)},
    ],
)
def test_another_order_is_another_entry(prefix, cache, other):
    for options in ({}, {"megatron": MegatronOrder(range(39), 150)}, other):
        build(prefix, cache, **options)
    assert len(entries(cache)) == 3
    assert epochs(build(prefix, cache, **other)) == epochs(build(prefix, None, **other))


@pytest.mark.parametrize("lengths", [range(39, 0, -1), range(1, 41), [780]])
def test_a_rewritten_pair_never_has_the_old_index(prefix, cache, lengths):
    build(prefix, cache)
    write_pair(prefix, lengths)
    assert epochs(build(prefix, cache)) == epochs(build(prefix, None))
    assert len(entries(cache)) == 2


def test_a_rewritten_manifest_alone_makes_another_entry(prefix, cache):
    manifest = Path(f"{prefix}.manifest.json")
    for content in ("one", "two"):
        manifest.write_text(content)
        build(prefix, cache)
    assert len(entries(cache)) == 2


def test_a_pair_rewritten_while_open_does_not_leave_its_index_to_the_new_one(prefix, cache):
    indexed = IndexedDataset(prefix)
    write_pair(prefix, range(39, 0, -1))
    GPTDataset(indexed, range(39), seq_length=5, seed=1, cache=cache)
    assert epochs(build(prefix, cache)) == epochs(build(prefix, None))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def save(array):
    return lambda path: np.save(path, array)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x93NUMPY garbage" * 50),
    "missing": Path.unlink,
    "of another dtype": save(np.zeros((100, 2), dtype=np.int64)),
    "pickled": save(np.array([{"a": 1}], dtype=object)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_entry_is_built_anew(cache, caplog, name, damage):
    get(cache, some_index)
    (entry,) = entries(cache)
    DAMAGES[damage](entry / f"{name}.npy")
    with caplog.at_level(logging.WARNING, "megagpt"):
        assert_equal(get(cache, some_index), some_index())
    assert f"{entry} is damaged and built anew" in caplog.text
    assert entries(cache) == [entry]
    assert_equal(get(cache, never), some_index())


@pytest.mark.parametrize("name", ["marks", "sequences", "order"])
def test_an_entry_of_fewer_rows_is_built_anew(cache, name):
    get(cache, some_index)
    (entry,) = entries(cache)
    path = entry / f"{name}.npy"
    np.save(path, np.load(path)[:-2])
    assert_equal(get(cache, some_index), some_index())


def test_a_folder_left_by_a_kill_does_not_count(cache):
    get(cache, some_index)
    (entry,) = entries(cache)
    for left in (f"{entry}.tmp{os.getpid()}", f"{entry}.tmp1"):
        shutil.copytree(entry, left)
        truncate(Path(left) / "order.npy")
    shutil.rmtree(entry)
    assert_equal(get(cache, some_index), some_index())
    assert_equal(get(cache, never), some_index())


def test_what_a_kill_left_is_removed_after_a_day(cache):
    get(cache, some_index)
    (entry,) = entries(cache)
    for name, hours in (("old", 25), ("new", 23)):
        left = Path(f"{entry}.tmp_{name}")
        shutil.copytree(entry, left)
        os.utime(left, times=(time.time() - hours * 3600,) * 2)
    shutil.rmtree(entry)
    get(cache, some_index)
    assert not Path(f"{entry}.tmp_old").exists() and Path(f"{entry}.tmp_new").exists()


def test_a_file_in_the_place_of_an_entry_warns(cache, caplog):
    get(cache, some_index)
    (entry,) = entries(cache)
    shutil.rmtree(entry)
    entry.write_text("")
    with caplog.at_level(logging.WARNING, "megagpt"):
        assert_equal(get(cache, some_index), some_index())
    assert "cannot keep the sample index" in caplog.text


def test_a_folder_that_cannot_be_written_warns_and_goes_on_in_memory(prefix, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    with caplog.at_level(logging.WARNING, "megagpt"):
        assert epochs(build(prefix, cache)) == epochs(build(prefix, None))
    (record,) = caplog.records
    assert f"{cache} cannot keep the sample index" in record.message
    assert "--data.index_cache" in record.message and "\n" not in record.message


def test_an_error_of_the_data_is_not_taken_for_one_of_the_cache(cache):
    def broken():
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        get(cache, broken)
    assert entries(cache) == []


def test_small_indices_are_not_kept(prefix, cache, monkeypatch):
    monkeypatch.setattr(index_cache, "SMALLEST_CACHED_BYTES", 1000)
    build(prefix, cache)
    cached_index(cache, {"data": "a"}, some_index, num_bytes=999)
    assert not cache.exists()
    assert_equal(cached_index(cache, {"data": "a"}, some_index, num_bytes=1000), some_index())
    assert_equal(cached_index(cache, {"data": "a"}, never, num_bytes=1000), some_index())


PROCESS = """
import pathlib, sys, time
import numpy as np
from megagpt.data.samples import index_cache
from megagpt.data.samples.order import SampleIndex

index_cache.SMALLEST_CACHED_BYTES = 0
folder, own, other = map(pathlib.Path, sys.argv[1:])

def build():
    (folder / f"built by {own.name}").touch()
    time.sleep(0.3)  # the other one comes meanwhile
    value = sum(own.name.encode())
    return SampleIndex(*(np.full(shape, value, np.uint32) for shape in (30, 100, (7, 2))))

own.touch()
while not other.exists():
    time.sleep(0.001)
index = index_cache.cached_index(folder / "cache", {"a": 1}, build, num_bytes=1)
print(index.sequences.sum(), index.order.sum(), index.marks.sum())
"""


def test_of_two_processes_at_once_one_builds_and_both_agree(tmp_path):
    names = [str(tmp_path / name) for name in "xy"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), own, other],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own, other in (names, names[::-1])
    ]
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(list(tmp_path.glob("built by *"))) == 1
    assert printed[0] == printed[1] != ""
    assert sorted(path.name for path in (tmp_path / "cache").iterdir())[-1] == "lock"
    assert len(list((tmp_path / "cache").iterdir())) == 2
