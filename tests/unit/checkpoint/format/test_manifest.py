"""The manifest: round trip, its own hash, newer formats, and values that no writer makes."""

import dataclasses
import hashlib
import json
import os
import re

import pytest

from megagpt.checkpoint.format.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    Layout,
    read_links,
    read_manifest,
    read_state,
    write_manifest,
)
from megagpt.checkpoint.format.pieces import Piece, TensorRecord
from megagpt.checkpoint.format.shard_file import DamagedCheckpoint, FileRecord
from megagpt.checkpoint.format.slices import Slice
from megagpt.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig


@pytest.fixture
def manifest(make_state):
    pieces = [Piece(0, Slice((0, 2), (0, 4), 0, 8)), Piece(3, Slice((2, 3), (0, 4), 0, 4))]
    config = Config(
        model=ModelConfig(vocab_size=3),
        optimizer=OptimizerConfig(betas=(0.8, 0.9), lr=0.1 + 0.2),
        data=DataConfig(path={"data/wörter": 0.7, "b": 0.3}),
    )
    return CheckpointManifest(
        state=make_state(
            config=config, tokenizer_sha256="ab" * 32, loss_scaler={"cur_scale": 2.0**16}
        ),
        layout=Layout(4, 2, 1, 1, "cpu"),
        tensors={"a.weight": TensorRecord.of((3, 4), tuple(pieces))},
        files={"weights-00000.safetensors": FileRecord(1 << 40, ("cd" * 16, "ef" * 16))},
        versions={"megagpt": "0.1", "torch": "2"},
        created="2030-01-01T00:00:00+00:00",
        previous="12" * 32,
        line=((8, "34" * 32), (4, "56" * 32)),
    )


def values_of(directory):
    return json.loads((directory / MANIFEST_FILE).read_text())


def test_round_trip_gives_every_field_back(tmp_path, manifest):
    digest = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == dataclasses.replace(manifest, sha256=digest)
    assert os.listdir(tmp_path) == [MANIFEST_FILE]
    # A person finds a tensor's line.
    assert re.search(r'^  "a.weight": \{.*\}$', (tmp_path / MANIFEST_FILE).read_text(), re.M)


def test_links_are_read_from_the_first_lines_alone(tmp_path, manifest):
    digest = write_manifest(tmp_path, manifest)
    expected = (digest, manifest.created, manifest.previous, manifest.line)
    assert read_links(tmp_path) == expected
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:800])
    assert read_links(tmp_path) == expected
    digest = write_manifest(tmp_path, dataclasses.replace(manifest, previous=None, line=()))
    assert read_links(tmp_path) == (digest, manifest.created, None, ())
    for content in (b"", b"\xff" * 9, b'{"sha256": "00"}', b"{}\n" * 9, b"[" * 100_000):
        path.write_bytes(content)
        assert read_links(tmp_path) is None
    path.unlink()
    assert read_links(tmp_path) is None


def test_the_state_is_read_from_the_head_alone(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    path = tmp_path / MANIFEST_FILE
    content = path.read_bytes()
    head = content.index(b' "tensors"')
    path.write_bytes(content[: head + 20])
    assert read_state(tmp_path) == manifest.state
    # The hash of the whole stands in the head, and that of the head cannot hold it.
    whole = content.index(b'"sha256": "') + len('"sha256": "')
    for position in {*range(head)} - {*range(whole, whole + 64)}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint):
            read_state(tmp_path)


def test_hash_is_that_of_the_text_with_zeros_in_its_place(tmp_path, manifest):
    digest = write_manifest(tmp_path, manifest)
    text = (tmp_path / MANIFEST_FILE).read_text()
    assert text.count(digest) == 1
    assert hashlib.sha256(text.replace(digest, "0" * 64).encode()).hexdigest() == digest


def test_every_single_bit_flip_is_caught(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    content = (tmp_path / MANIFEST_FILE).read_bytes()
    with (tmp_path / MANIFEST_FILE).open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                with pytest.raises(DamagedCheckpoint):
                    read_manifest(tmp_path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    read_manifest(tmp_path)


@pytest.mark.parametrize("size", [0, 0.5, -1])
def test_truncated_manifest_is_damaged(tmp_path, manifest, size):
    write_manifest(tmp_path, manifest)
    length = (tmp_path / MANIFEST_FILE).stat().st_size
    os.truncate(tmp_path / MANIFEST_FILE, int(length * size) if size >= 0 else length - 2)
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path}/{MANIFEST_FILE} is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"sha256": 5}', b"[" * 100_000, b"\xff"])
def test_what_is_no_manifest_is_damaged(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="is damaged"):
        read_manifest(tmp_path)


def test_folder_without_a_manifest_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{path} holds no complete checkpoint .* name a step"):
            read_manifest(path)


def test_newer_format_is_refused_with_the_remedy(tmp_path, manifest, seal_manifest):
    write_manifest(tmp_path, manifest)
    seal_manifest(tmp_path, {**values_of(tmp_path), "format": 4, "tensors": "of another kind"})
    with pytest.raises(ValueError, match="has format 4, .* reads 1, 2 and 3; use the version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_formats_of_before_are_read(tmp_path, manifest, seal_manifest, version):
    write_manifest(tmp_path, manifest)
    values = values_of(tmp_path) | {"format": version}
    del values["head_sha256"]
    values["tensors"]["a.weight"]["pieces"] = [
        {"shard": p.shard, **dataclasses.asdict(p.slice)}
        for p in manifest.tensors["a.weight"].pieces
    ]
    del values["tensors"]["a.weight"]["boxes"]
    seal_manifest(tmp_path, values)
    read = read_manifest(tmp_path)
    assert dataclasses.replace(read, sha256="") == manifest
    assert read_state(tmp_path) == manifest.state


def test_sealing_alone_is_no_damage(tmp_path, manifest, seal_manifest):
    write_manifest(tmp_path, manifest)
    seal_manifest(tmp_path, values_of(tmp_path))
    read = read_manifest(tmp_path)
    assert dataclasses.replace(read, sha256="") == manifest


_BOX = ("tensors", "a.weight", "boxes", 0)
_RUN = (*_BOX, "runs", 0)
_FILE = ("files", "weights-00000.safetensors")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors", "a.weight", "shape"), ["3", 4]),
        (("tensors", "a.weight", "shape"), [3, 4, 1]),
        (("tensors", "a.weight", "shape"), []),
        (("tensors", "a.weight", "shape"), [3, 5]),
        (("tensors", "a.weight", "shape"), [-3, -4]),
        (("tensors", "a.weight", "dtype"), "BF16"),
        (("tensors", "a.weight", "boxes"), []),
        ((*_BOX, "runs"), []),
        ((*_BOX, "rows"), [0]),
        ((*_BOX, "rows"), [2, 0]),
        ((*_BOX, "rows"), [1, 3]),
        ((*_BOX, "columns"), [0, 1e9]),
        (_RUN, [0, 8, 1, "../0", 1]),
        (_RUN, [0, 8, 1, -1, 1]),
        (_RUN, [-4, 8, 1, 0, 1]),
        (_RUN, [True, 8, 1, 0, 1]),
        (_RUN, [0, 1 << 60, 1, 0, 1]),
        (_RUN, [0, 8.0, 1, 0, 1]),
        (_RUN, [0, 0, 1, 0, 1]),
        (_RUN, [0, 8, 0, 0, 1]),
        (_RUN, [0, 8, 1 << 60, 0, 1]),
        (_RUN, [0, 8, 1, 0, -1]),
        (_RUN, [0, 8, 1, 0]),
        ((*_FILE, "bytes"), -1),
        ((*_FILE, "bytes"), "1"),
        ((*_FILE, "block_xxh3_128"), None),
        (_FILE, {"bytes": 1, "block_crc32": ["ab"]}),
        (("files", "../../secret"), {"bytes": 1, "block_xxh3_128": ["ab"]}),
        (("block_bytes",), 1),
        (("format",), None),
        (("layout", "tensor_parallel_size"), 0),
        (("layout", "further"), 0),
        (("state", "step"), "10"),
        (("state", "consumed_samples"), -1),
        (("state", "config", "model", "hidden_size"), "wide"),
        (("state", "config", "model", "further"), 1),
        (("state",), None),
        (("tensors",), []),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else repr(value),
)
def test_values_that_no_writer_makes_are_refused_in_one_line(
    tmp_path, manifest, seal_manifest, path, value
):
    write_manifest(tmp_path, manifest)
    values = inner = values_of(tmp_path)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    seal_manifest(tmp_path, values)
    with pytest.raises(ValueError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "key", ["tensors", "files", "state", "layout", "versions", "previous", "line"]
)
def test_missing_key_is_damage(tmp_path, manifest, seal_manifest, key):
    write_manifest(tmp_path, manifest)
    values = values_of(tmp_path)
    del values[key]
    seal_manifest(tmp_path, values)
    with pytest.raises(DamagedCheckpoint, match=f"is damaged .*{key}"):
        read_manifest(tmp_path)
