"""Small checkpoints of several shards, written without a model, without DeepSpeed."""

import hashlib
import json

import numpy as np
import pytest

from megagpt.checkpoint.directory import step_directory
from megagpt.checkpoint.format import manifest as manifest_module
from megagpt.checkpoint.format import shard_file
from megagpt.checkpoint.format.manifest import (
    KINDS,
    CheckpointManifest,
    CheckpointState,
    Layout,
    optimizer_file,
    tensor_key,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.pieces import Piece, TensorRecord
from megagpt.checkpoint.format.shard_file import ShardWriter
from megagpt.checkpoint.format.slices import local_slice
from megagpt.config.schema import Config, ModelConfig

CREATED = "2030-01-01T00:00:00+00:00"
CONFIG = Config(model=ModelConfig(vocab_size=13))
SHAPES = {"embedding.weight": (13, 8), "mlp.weight": (6, 12), "norm.weight": (7,)}
TP_DIMS = {"embedding.weight": 0, "mlp.weight": 1, "norm.weight": None}


def make_values(seed=0):
    """Each kind of each tensor, as {(kind, name): values}."""
    generator = np.random.default_rng(seed)
    return {
        (kind, name): generator.standard_normal(shape).astype(np.float32)
        for name, shape in SHAPES.items()
        for kind in KINDS
    }


def make_state(step=10, **fields):
    fields = {"config": CONFIG, **fields}
    return CheckpointState(
        step=step,
        consumed_samples=32 * step,
        consumed_tokens=32 * 256 * step,
        data_fingerprint={"train": {"bytes": 5}},
        learning_rate=0.25,
        adam_step=step,
        **fields,
    )


def write_checkpoint(
    checkpoints,
    step=10,
    *,
    tp_size=1,
    dp_size=1,
    values=None,
    previous=None,
    line=(),
    created=CREATED,
    **fields,
):
    """Writes a step as the ranks of a layout would; returns its folder."""
    values = make_values() if values is None else values
    shapes = {name: array.shape for (_, name), array in values.items()}
    directory = step_directory(checkpoints, step)
    directory.mkdir(parents=True)
    records, files = {}, {}
    for shard in range(tp_size * dp_size):
        dp_rank, tp_rank = divmod(shard, tp_size)
        extra = np.arange(40, dtype=np.uint8) + shard
        headers = ({}, {"random.cpu": (extra.shape, extra.dtype)})
        tensors = ([], [extra])
        for name, shape in shapes.items():
            part = _own_part(shape, TP_DIMS.get(name), tp_size, tp_rank, dp_size, dp_rank)
            if part is None:
                continue
            before = records[name].pieces if name in records else ()
            records[name] = TensorRecord.of(shape, (*before, Piece(shard, part)))
            for kind in KINDS:
                in_optimizer, key = tensor_key(kind, name)
                box = values[kind, name].reshape(shape[0], -1)
                box = box[slice(*part.rows), slice(*part.columns)]
                headers[in_optimizer][key] = ((part.size,), np.dtype(np.float32))
                tensors[in_optimizer].append(box.reshape(-1)[part.start : part.end])
        for name, header, arrays in zip(
            (weights_file(shard), optimizer_file(shard)), headers, tensors, strict=True
        ):
            writer = ShardWriter(directory / name, header)
            for array in arrays:
                writer.write(array)
            files[name] = writer.close()
    write_manifest(
        directory,
        CheckpointManifest(
            state=make_state(step, **fields),
            layout=Layout(tp_size * dp_size, tp_size, zero_stage=1),
            tensors=records,
            files=files,
            versions={"megagpt": "0"},
            created=created,
            previous=previous,
            line=line,
        ),
    )
    return directory


def _own_part(shape, tp_dim, tp_size, tp_rank, dp_size, dp_rank):
    local_shape = list(shape)
    if tp_dim is not None:
        local_shape[tp_dim] = -(-shape[tp_dim] // tp_size)
    elif tp_rank > 0:
        return None
    size = int(np.prod(local_shape))
    return local_slice(
        shape,
        tuple(local_shape),
        tp_dim=tp_dim,
        tp_rank=tp_rank,
        start=size * dp_rank // dp_size,
        end=size * (dp_rank + 1) // dp_size,
    )


def seal_manifest(directory, values):
    """Writes any values as a manifest whose hash is right."""
    values = {**values, "sha256": "0" * 64}
    text = json.dumps(values)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / manifest_module.MANIFEST_FILE).write_text(text.replace("0" * 64, digest, 1))


def seal_as_format_1(directory):
    """Makes a step what it was when blocks were hashed with SHA-256."""
    values = json.loads((directory / manifest_module.MANIFEST_FILE).read_text())
    size = values["block_bytes"]
    for name, entry in values["files"].items():
        content = (directory / name).read_bytes()
        blocks = [content[i : i + size] for i in range(0, len(content), size)]
        hashes = [hashlib.sha256(block).hexdigest() for block in blocks]
        values["files"][name] = {"bytes": entry["bytes"], "block_sha256": hashes}
    seal_manifest(directory, values | {"format": 1})


@pytest.fixture(scope="session", name="make_values")
def _make_values():
    return make_values


@pytest.fixture(scope="session", name="make_state")
def _make_state():
    return make_state


@pytest.fixture(scope="session", name="write_checkpoint")
def _write_checkpoint():
    return write_checkpoint


@pytest.fixture(scope="session", name="seal_manifest")
def _seal_manifest():
    return seal_manifest


@pytest.fixture(scope="session", name="seal_as_format_1")
def _seal_as_format_1():
    return seal_as_format_1


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every file has several; returns their bytes."""
    for module in (shard_file, manifest_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 128)
    return 128


@pytest.fixture
def known_config(monkeypatch):
    """Takes the saved configuration as known, since parsing it is most of reading a manifest."""
    monkeypatch.setattr(manifest_module, "config_from_dict", lambda _: CONFIG)
