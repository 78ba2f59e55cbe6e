"""Checkpoints to and from the folders of Hugging Face's transformers, one tensor at a time.

Next files: `architecture.py` and `names.py` (what maps to what), `files.py`,
`megagpt/checkpoint/format/reader.py`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]

from megagpt import __version__
from megagpt.checkpoint.directory import find_checkpoint, step_directory, write_latest
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
from megagpt.checkpoint.format.reader import CheckpointReader
from megagpt.checkpoint.format.shard_file import FileRecord, ShardWriter
from megagpt.checkpoint.format.slices import whole
from megagpt.checkpoint.huggingface.architecture import config_json, model_config
from megagpt.checkpoint.huggingface.files import (
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_TYPES,
    HuggingFaceFolder,
    num_bytes,
    staged,
    write_file,
    write_safetensors,
)
from megagpt.checkpoint.huggingface.names import (
    TensorMap,
    parameter_shapes,
    places,
    tensor_maps,
)
from megagpt.config.command_line import config_to_dict
from megagpt.config.schema import Config, DataConfig
from megagpt.files import encode_json, file_sha256

WeightType = Literal["fp32", "bf16", "fp16"]
MODEL_FILE = "model.yaml"
"""The settings of an imported model, for the run that trains it on."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_CONFIG = "tokenizer_config.json"

Shapes = Mapping[str, tuple[int, ...]]


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: WeightType = "fp32",
    max_shard_bytes: int = 5 << 30,
    eos_token_id: int | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder that transformers' `AutoModelForCausalLM` opens.

    Never more than one tensor of theirs, and one of ours that it is made from, is in memory.

    Args:
        checkpoint: Run folder (its newest step) or step folder, written by any layout.
        output: The folder; appears when it is whole.
        dtype: Of the weights.
        max_shard_bytes: Size of a weights file, unless one tensor alone is larger.
        eos_token_id: The token that ends a document.
        files: Further content of the folder by name, such as a tokenizer.

    Raises:
        ValueError: If the folder exists, no architecture has the model, a weight does not fit the
            type, or the checkpoint is damaged.
        OSError: If the folder cannot be written.
    """
    if dtype not in TORCH_TYPES:
        raise ValueError(f"dtype={dtype} is unknown; choose from {', '.join(get_args(WeightType))}")
    if max_shard_bytes <= 0:
        raise ValueError(f"a weights file of {max_shard_bytes} bytes holds nothing; allow more")
    with CheckpointReader(find_checkpoint(checkpoint)) as reader:
        config = reader.manifest.state.config.model
        torch_name = str(TORCH_TYPES[dtype]).removeprefix("torch.")
        content = dict(files or {})
        content["config.json"] = encode_json(
            config_json(config, dtype=torch_name, eos_token_id=eos_token_id)
        )
        if eos_token_id is not None:
            content["generation_config.json"] = encode_json({"eos_token_id": eos_token_id})
        ours = parameter_shapes(config)
        _require_same_tensors(reader, ours)
        maps = {tensor.theirs: tensor for tensor in tensor_maps(config)}
        theirs = {name: t.their_shape(ours[t.ours[0]]) for name, t in maps.items()}
        shards = _shards(theirs, dtype, max_shard_bytes)
        if len(shards) > 1:
            content[INDEX_FILE] = _index(shards, dtype)

        def read(name: str) -> np.ndarray:
            return _to_theirs(reader, maps[name], theirs[name])

        with staged(output) as staging:
            for file, shapes in shards.items():
                write_safetensors(staging / file, shapes, read, dtype=dtype)
            for name, data in content.items():
                write_file(staging / name, data)


def import_checkpoint(source: Path, output: Path) -> Path:
    """Makes a run folder, with a checkpoint at step 0, of a folder of transformers.

    Beside the checkpoint stand `model.yaml`, the settings for the run that goes on from it, and the
    tokenizer, if there is a tokenizer.json or tokenizer.model. No pickle is ever opened.

    Args:
        source: With config.json and safetensors, one file or several.
        output: The run folder; appears when it is whole.

    Returns:
        The step folder.

    Raises:
        ValueError: If the run folder exists, our model cannot compute theirs, or tensors are
            missing, unknown, not finite or of another shape or type than config.json means.
        OSError: If something cannot be read or written.
    """
    with HuggingFaceFolder(source) as folder:
        config = model_config(folder.config)
        ours = parameter_shapes(config)
        maps = tensor_maps(config)
        names = places(folder.names(), folder.config["model_type"])
        if config.tie_embeddings and "lm_head.weight" in names:
            _require_tied(folder, names.get(maps[0].theirs), names.pop("lm_head.weight"))
        theirs = {t.theirs: t.their_shape(ours[t.ours[0]]) for t in maps}
        _require_shapes(folder, names, theirs)
        sources = {name: (t, part) for t in maps for part, name in enumerate(t.ours)}

        def read(name: str) -> np.ndarray:
            tensor, part = sources[name]
            values = _to_ours(folder, names[tensor.theirs], tensor, part)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{source} has {names[tensor.theirs]} with values that are not finite (NaN or "
                    "infinity); a model of them gives no loss, fetch it again or take another one"
                )
            return values

        with staged(output) as staging:
            tokenizer = next((n for n in _TOKENIZERS if (source / n).is_file()), None)
            if tokenizer is not None:
                for name in (tokenizer, _TOKENIZER_CONFIG):
                    if (source / name).is_file():
                        write_file(staging / name, (source / name).read_bytes())
            state = CheckpointState(
                step=0,
                consumed_samples=0,
                consumed_tokens=0,
                config=Config(
                    model=config,
                    data=DataConfig(tokenizer_path=str(output / tokenizer) if tokenizer else None),
                    output_dir=str(output),
                ),
                data_fingerprint={},
                tokenizer_sha256=file_sha256(staging / tokenizer) if tokenizer else None,
                imported_from=str(source),
            )
            settings = {"model": config_to_dict(state.config)["model"]}
            write_file(staging / MODEL_FILE, yaml.safe_dump(settings, sort_keys=False).encode())
            step = step_directory(staging / "checkpoints", 0)
            step.mkdir(parents=True)
            write_latest(step.parent, 0, _write_step(step, state, ours, read))
    return step_directory(output / "checkpoints", 0)


# --- export


def _require_same_tensors(reader: CheckpointReader, shapes: Shapes) -> None:
    found = {name: record.shape for name, record in reader.manifest.tensors.items()}
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise ValueError(
                f"{reader.directory} has {name} of shape {found.get(name)}, its configuration "
                f"means {shapes.get(name)}; export another step_* folder"
            )


def _shards(shapes: Shapes, dtype: str, max_shard_bytes: int) -> dict[str, Shapes]:
    """Their tensors by file, in order, a file begun where the next tensor would not fit."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_shard_bytes
    for name, shape in shapes.items():
        size = num_bytes(shape, dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _index(shards: dict[str, Shapes], dtype: str) -> bytes:
    """Which file holds which tensor."""
    total = sum(num_bytes(shape, dtype) for shapes in shards.values() for shape in shapes.values())
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    return encode_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _to_theirs(reader: CheckpointReader, tensor: TensorMap, shape: tuple[int, ...]) -> np.ndarray:
    """One of their tensors, read from ours; contiguous."""
    if len(tensor.ours) == 1:
        values = reader.tensor(tensor.ours[0])
        return np.ascontiguousarray(values.T) if tensor.is_transposed else values
    fused = np.empty(shape, np.float32)
    parts = np.split(fused, len(tensor.ours), axis=-1)  # views
    for part, name in zip(parts, tensor.ours, strict=True):
        values = reader.tensor(name)
        part[:] = values.T if tensor.is_transposed else values
    return fused


# --- import


def _require_tied(folder: HuggingFaceFolder, embedding: str | None, output: str) -> None:
    """A tied output layer may stand in the files too, as long as it is the embedding."""
    if embedding is None or not torch.equal(folder.tensor(embedding), folder.tensor(output)):
        raise ValueError(
            f"{folder.directory} has tie_word_embeddings=true and an lm_head.weight that is not "
            "the embedding; set it to false in config.json if the weights are right"
        )


def _require_shapes(folder: HuggingFaceFolder, names: Mapping[str, str], shapes: Shapes) -> None:
    """Checks that the tensors are those of the model; `names` has their names in the files."""
    remedy = "import a folder whose config.json and weights are of one model"
    for name in sorted(shapes.keys() ^ names.keys()):
        what = "lacks" if name in shapes else "has the unknown tensor"
        raise ValueError(f"{folder.directory} {what} {name}, going by its config.json; {remedy}")
    for name, shape in shapes.items():
        found, dtype = folder.kind(names[name])
        if found != shape:
            raise ValueError(
                f"{folder.directory} has {name} of shape {found}, its config.json means {shape}; "
                f"{remedy}"
            )
        if dtype not in ("F32", "BF16", "F16"):
            raise ValueError(
                f"{folder.directory} has {name} in {dtype}, this reads F32, BF16 and F16; save the "
                "model in one of them"
            )


def _to_ours(folder: HuggingFaceFolder, name: str, tensor: TensorMap, part: int) -> np.ndarray:
    """One of our tensors, read from a part of theirs."""
    values = folder.tensor(name, part=part, num_parts=len(tensor.ours))
    return (values.T if tensor.is_transposed else values).float().numpy()


def _write_step(
    step: Path, state: CheckpointState, shapes: Shapes, read: Callable[[str], np.ndarray]
) -> str:
    """Writes a step as one rank would, with moments of 0; returns the hash of its manifest."""
    moments = {tensor_key(kind, n)[1]: s for n, s in shapes.items() for kind in KINDS[1:]}

    def zeros(name: str) -> np.ndarray:
        return np.zeros(moments[name], np.float32)

    manifest = CheckpointManifest(
        state=state,
        layout=Layout(world_size=1),
        tensors={n: TensorRecord.of(s, [Piece(0, whole(s))]) for n, s in shapes.items()},
        files={
            weights_file(0): _write_values(step / weights_file(0), shapes, read),
            optimizer_file(0): _write_values(step / optimizer_file(0), moments, zeros),
        },
        versions={
            "megagpt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return write_manifest(step, manifest)


def _write_values(path: Path, shapes: Shapes, read: Callable[[str], np.ndarray]) -> FileRecord:
    float32 = np.dtype(np.float32)
    writer = ShardWriter(path, {name: (shape, float32) for name, shape in shapes.items()})
    try:
        for name in shapes:
            writer.write(read(name))
        return writer.close()
    finally:
        writer.abandon()
