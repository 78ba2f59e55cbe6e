"""Reading of any layout; nothing that is not what was written is ever returned or run."""

import json
import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import xxhash

from megagpt.checkpoint.format import reader as reader_module
from megagpt.checkpoint.format.manifest import KINDS, MANIFEST_FILE, read_manifest
from megagpt.checkpoint.format.reader import CheckpointReader, stray_files, verify_checkpoint
from megagpt.checkpoint.format.shard_file import DamagedCheckpoint
from megagpt.checkpoint.format.slices import Slice

LAYOUTS = [(1, 1), (1, 3), (2, 1), (3, 1), (2, 2), (4, 2)]


@pytest.fixture
def step(tmp_path, write_checkpoint, small_blocks):
    return write_checkpoint(tmp_path, tp_size=2, dp_size=2)


def read_all(directory, expected):
    """Reads everything; what is returned must be what was written, whatever is raised later."""
    with CheckpointReader(directory) as reader:
        for name in reader.manifest.tensors:
            for kind in KINDS:
                np.testing.assert_array_equal(reader.tensor(name, kind), expected[kind, name])
        for shard in range(reader.manifest.layout.world_size):
            np.testing.assert_array_equal(
                reader.extra(shard, "random.cpu"), np.arange(40, dtype=np.uint8) + shard
            )


@pytest.mark.parametrize(("tp_size", "dp_size"), LAYOUTS)
def test_every_layout_gives_the_same_tensors(
    tmp_path, write_checkpoint, make_values, small_blocks, tp_size, dp_size
):
    directory = write_checkpoint(tmp_path, tp_size=tp_size, dp_size=dp_size)
    read_all(directory, make_values())
    assert verify_checkpoint(directory) == [] == stray_files(directory, read_manifest(directory))
    with CheckpointReader(directory) as reader:
        for name in reader.manifest.tensors:
            np.testing.assert_array_equal(reader.tensor(name), make_values()["weight", name])
        assert reader.extra(0, "random.cuda") is None


@pytest.mark.parametrize(("tp_size", "dp_size"), LAYOUTS)
def test_parts_are_read_of_all_kinds_at_once(
    tmp_path, write_checkpoint, make_values, small_blocks, tp_size, dp_size
):
    values = make_values()
    draw = random.Random(3)
    with CheckpointReader(write_checkpoint(tmp_path, tp_size=tp_size, dp_size=dp_size)) as reader:
        for _ in range(100):
            rows, columns = (sorted(draw.sample(range(n + 1), 2)) for n in (6, 12))
            size = (rows[1] - rows[0]) * (columns[1] - columns[0])
            start, end = sorted(draw.sample(range(size + 1), 2))
            targets = {kind: np.full(end - start, np.nan, np.float32) for kind in KINDS}
            part = Slice(tuple(rows), tuple(columns), start, end)
            reader.read_into("mlp.weight", part, targets)
            for kind, target in targets.items():
                box = values[kind, "mlp.weight"][slice(*rows), slice(*columns)]
                np.testing.assert_array_equal(target, box.reshape(-1)[start:end])


@pytest.mark.parametrize("is_of_before", [False, True])
def test_single_bit_flips_are_caught_before_a_wrong_tensor_is_returned(
    step, make_values, small_blocks, known_config, seal_as_format_1, is_of_before
):
    if is_of_before:
        seal_as_format_1(step)
    sizes = {path: path.stat().st_size for path in step.iterdir()}
    assert len(sizes) == 9
    assert min(size for path, size in sizes.items()) > 2 * small_blocks
    expected, draw, caught = make_values(), random.Random(4), Counter()
    positions = [(path, at) for path, size in sorted(sizes.items()) for at in range(size)]
    for path, at in draw.choices(positions, k=1000):
        with path.open("r+b", buffering=0) as file:
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), at)
            with pytest.raises(DamagedCheckpoint, match=str(path)):
                read_all(step, expected)
            os.pwrite(file.fileno(), bytes([byte]), at)
        caught[path.name] += 1
    assert len(caught) == 9
    read_all(step, expected)


def test_checkpoint_whose_blocks_have_sha256_is_read_and_verified(
    step, make_values, seal_as_format_1
):
    seal_as_format_1(step)
    assert '"block_sha256"' in (step / MANIFEST_FILE).read_text()
    assert "xxh3" not in (step / MANIFEST_FILE).read_text()
    read_all(step, make_values())
    assert verify_checkpoint(step) == []


def test_damage_harms_only_what_stands_in_its_block(step, make_values, small_blocks):
    path = step / "optimizer-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with CheckpointReader(step) as reader:
        for name in reader.manifest.tensors:
            values = reader.tensor(name, "weight")
            np.testing.assert_array_equal(values, make_values()["weight", name])
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            reader.tensor("norm.weight", "exp_avg_sq")


def test_only_the_blocks_of_what_is_asked_for_are_read(
    tmp_path, write_checkpoint, make_values, small_blocks, monkeypatch
):
    directory = write_checkpoint(tmp_path, tp_size=1, dp_size=2)
    read = Counter()
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        read[os.readlink(f"/proc/self/fd/{descriptor}")] += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    with CheckpointReader(directory) as reader:
        part = Slice((0, 6), (0, 12), 0, 20)  # the first 20 of 72 elements, all on the first rank
        target = np.empty(20, np.float32)
        monkeypatch.setattr(os, "preadv", counted)
        reader.read_into("mlp.weight", part, {"weight": target})
    path = directory / "weights-00000.safetensors"
    assert list(read) == [str(path)]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    blocks = -(-header // small_blocks) + 20 * 4 // small_blocks + 2
    assert read[str(path)] <= blocks * small_blocks < path.stat().st_size
    expected = make_values()["weight", "mlp.weight"].reshape(-1)[:20]
    np.testing.assert_array_equal(target, expected)


def test_a_block_of_many_small_tensors_is_read_once(step, small_blocks, monkeypatch):
    read = Counter()
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        read[os.readlink(f"/proc/self/fd/{descriptor}"), offset] += 1
        return preadv(descriptor, buffers, offset)

    with CheckpointReader(step, held_bytes=1 << 20) as reader:
        monkeypatch.setattr(os, "preadv", counted)
        monkeypatch.setattr(reader_module, "_MAX_OPEN_FILES", 1)  # reopened, and not read again
        for name in 2 * [*reader.manifest.tensors]:
            reader.read_into(name, Slice((0, 1), (0, 1), 0, 1), {"weight": np.empty(1, "f4")})
    assert len(read) > 3 and max(read.values()) == 1


def test_missing_file_is_named_by_reading_and_by_verifying(step, make_values):
    (step / "weights-00002.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="weights-00002.safetensors is missing"):
        read_all(step, make_values())
    assert verify_checkpoint(step) == [f"{step}/weights-00002.safetensors is missing"]


def test_files_swapped_for_ones_of_the_same_size_are_caught(
    tmp_path, write_checkpoint, make_values
):
    step = write_checkpoint(tmp_path, tp_size=1, dp_size=4)
    first, second = (step / f"weights-0000{n}.safetensors" for n in (1, 3))
    assert first.stat().st_size == second.stat().st_size
    first.rename(step / "between")
    second.rename(first)
    (step / "between").rename(second)
    with pytest.raises(DamagedCheckpoint, match="weights-00001.safetensors is damaged"):
        read_all(step, make_values())
    assert len(verify_checkpoint(step)) == 2


def test_file_of_another_step_is_caught(tmp_path, write_checkpoint, make_values):
    step = write_checkpoint(tmp_path, 10)
    other = write_checkpoint(tmp_path, 20, values=make_values(seed=1))
    (other / "weights-00000.safetensors").rename(step / "weights-00000.safetensors")
    with pytest.raises(DamagedCheckpoint, match="weights-00000.safetensors is damaged"):
        read_all(step, make_values())


def test_stray_files_are_told_and_are_no_damage(step, make_values):
    for name in ("weights-00004.safetensors", "notes.txt"):
        (step / name).write_text("not of the checkpoint")
    read_all(step, make_values())
    assert verify_checkpoint(step) == []
    assert stray_files(step, read_manifest(step)) == ["notes.txt", "weights-00004.safetensors"]


def test_verify_lists_every_damaged_block_of_every_file(step, small_blocks):
    damaged = {"optimizer-00001.safetensors": [0, 2], "weights-00003.safetensors": [1]}
    for name, blocks in damaged.items():
        content = bytearray((step / name).read_bytes())
        for block in blocks:
            content[block * small_blocks + 5] ^= 1
        (step / name).write_bytes(content)
    (step / "weights-00000.safetensors").unlink()
    assert verify_checkpoint(step) == [
        f"{step}/optimizer-00001.safetensors is damaged: bytes 0 to 128 are not those that were "
        "written",
        f"{step}/optimizer-00001.safetensors is damaged: bytes 256 to 384 are not those that were "
        "written",
        f"{step}/weights-00000.safetensors is missing",
        f"{step}/weights-00003.safetensors is damaged: bytes 128 to 256 are not those that were "
        "written",
    ]
    (step / MANIFEST_FILE).unlink()
    (line,) = verify_checkpoint(step)
    assert "holds no complete checkpoint" in line


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("is_consistent", [False, True])
def test_pickle_in_the_place_of_a_shard_is_refused_and_not_run(
    step, make_values, seal_manifest, tmp_path, is_consistent
):
    content = pickle.dumps([_Payload(tmp_path / "ran"), bytes(9000)])
    (step / "weights-00000.safetensors").write_bytes(content)
    if is_consistent:
        values = json.loads((step / MANIFEST_FILE).read_text())
        blocks = [content[i : i + 128] for i in range(0, len(content), 128)]
        values["files"]["weights-00000.safetensors"] = {
            "bytes": len(content),
            "block_xxh3_128": [xxhash.xxh3_128_hexdigest(block) for block in blocks],
        }
        seal_manifest(step, values)
        assert verify_checkpoint(step) == []  # the hashes say nothing against it
    problem = "is not a safetensors file" if is_consistent else "bytes, its manifest says"
    with pytest.raises(DamagedCheckpoint, match=f"weights-00000.safetensors .*{problem}"):
        read_all(step, make_values())
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it would have


def test_other_model_is_told(step):
    with CheckpointReader(step) as reader:
        values = {"weight": np.empty(8, np.float32)}
        with pytest.raises(ValueError, match="has no head.weight; it is of another model"):
            reader.read_into("head.weight", Slice((0, 1), (0, 8), 0, 8), values)
        with pytest.raises(ValueError, match="has 0 of the 8 elements of embedding.weight"):
            reader.read_into("embedding.weight", Slice((13, 14), (0, 8), 0, 8), values)


def test_few_files_are_open_at_a_time_and_none_in_the_end(step, make_values, monkeypatch):
    monkeypatch.setattr(reader_module, "_MAX_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    with CheckpointReader(step) as reader:
        for name in 2 * list(reader.manifest.tensors):
            for kind in KINDS:
                values = reader.tensor(name, kind)
                np.testing.assert_array_equal(values, make_values()[kind, name])
                assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert verify_checkpoint(step) == [] and len(os.listdir("/proc/self/fd")) == before
