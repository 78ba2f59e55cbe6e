"""`manifest.json`: what a checkpoint holds, where, and the state of the run that wrote it.

It is written last, so its presence means whole; it holds a hash of itself and of every block of
every other file. JSON only: nothing of a checkpoint is ever unpickled or run. Knows no torch.
Next files: `reader.py`, `megagpt/checkpoint/directory.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.checkpoint.format.pieces import Box, Piece, Run, TensorRecord
from megagpt.checkpoint.format.shard_file import (
    BLOCK_BYTES,
    DamagedCheckpoint,
    FileRecord,
    FileTable,
)
from megagpt.checkpoint.format.slices import Slice
from megagpt.config.command_line import config_from_dict
from megagpt.config.schema import Config
from megagpt.files import decode_json, write_atomically

MANIFEST_FILE = "manifest.json"
FORMAT = 3
_READABLE = (1, 2, 3)
"""In 1 all hashes were SHA-256; those of blocks have their name beside them, in 1 too. In 1 and 2
each piece of a tensor stood by itself, and the head had no hash of its own."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter: the fp32 master weight and Adam's two moments."""

_DIGEST_KEY = '"sha256": "'
_HEAD_DIGEST_KEY = '"head_sha256": "'
_NO_DIGEST = "0" * 64
_LINK_LINES = 7
"""Within these stand the keys of `Links`."""
_HEAD_END = ' "tensors": {\n'
"""The line that follows the head; what stands before it does not grow with ranks or parameters."""
_MAX_LINE_BYTES = 4 << 20


def weights_file(shard: int) -> str:
    """Name of a rank's weights."""
    return f"weights-{shard:05d}.safetensors"


def optimizer_file(shard: int) -> str:
    """Name of a rank's moments."""
    return f"optimizer-{shard:05d}.safetensors"


def tensor_key(kind: str, name: str) -> tuple[bool, str]:
    """Whether a kind stands in the optimizer's file, and the tensor's name in its file."""
    return (False, name) if kind == "weight" else (True, f"{kind}.{name}")


@dataclass(frozen=True)
class Layout:
    """How the ranks that wrote a checkpoint were divided."""

    world_size: int
    """Ranks."""
    tensor_parallel_size: int = 1
    """Ranks of each layer."""
    pipeline_parallel_size: int = 1
    """Stages."""
    zero_stage: int = 0
    """ZeRO stage."""
    offload: str = "none"
    """Where the optimizer's state was: none, cpu or nvme."""


@dataclass(frozen=True)
class CheckpointState:
    """Position of a run, and what decides how it goes on."""

    step: int
    """Optimizer steps completed."""
    consumed_samples: int
    """Training samples completed."""
    consumed_tokens: int
    """Valid training tokens completed."""
    config: Config
    """The configuration that it was trained with."""
    data_fingerprint: dict[str, Any]
    """Sizes and hashes of the data, by split."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer, where the data's manifest tells it."""
    learning_rate: float = 0.0
    """Of the last step; the schedule depends on the step alone."""
    adam_step: int = 0
    """Updates that Adam has made; steps that an overflow skipped are not among them."""
    loss_scaler: dict[str, Any] = field(default_factory=dict)
    """Plain values of the fp16 loss scaler; empty in other precisions."""
    imported_from: str | None = None
    """The folder of another program that the weights at step 0 were taken from."""


@dataclass(frozen=True)
class CheckpointManifest:
    """All that a reader needs to know of a checkpoint."""

    state: CheckpointState
    """Position of the run."""
    layout: Layout
    """Of the ranks that wrote it."""
    tensors: Mapping[str, TensorRecord]
    """By canonical name."""
    files: Mapping[str, FileRecord]
    """By name in the folder."""
    versions: Mapping[str, str]
    """Of megagpt and what it stands on."""
    created: str = ""
    """When, in UTC."""
    previous: str | None = None
    """Hash of the manifest that was saved before it in the folder, of whatever line."""
    line: tuple[tuple[int, str], ...] = ()
    """(step, hash of its manifest) of those in the folder that led to it, the newest first."""
    sha256: str = ""
    """Hash of this manifest, known once it is written or read."""


def write_manifest(directory: Path, manifest: CheckpointManifest) -> str:
    """Writes the manifest, whole or not at all; returns its hash."""
    text = _encode(manifest)
    head = text[: text.index(_HEAD_END)]
    head_digest = hashlib.sha256(head.encode()).hexdigest()
    text = text.replace(_HEAD_DIGEST_KEY + _NO_DIGEST, _HEAD_DIGEST_KEY + head_digest, 1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    text = text.replace(_DIGEST_KEY + _NO_DIGEST, _DIGEST_KEY + digest, 1)
    write_atomically(directory / MANIFEST_FILE, text.encode())
    return digest


def read_manifest(directory: Path) -> CheckpointManifest:
    """Reads and checks the manifest of a step folder; reads no other file.

    Raises:
        DamagedCheckpoint: If it is not what was written.
        ValueError: If there is none, or a newer version wrote it.
    """
    path = directory / MANIFEST_FILE
    with _told(path):
        values = _verified(path.read_bytes(), path)
        _require_readable(values, path)
        return _decode(values)


def read_state(directory: Path) -> CheckpointState:
    """The state in the manifest of a step folder, from its first lines where they have a hash.

    Raises:
        As `read_manifest`; damage behind those lines is not seen.
    """
    path = directory / MANIFEST_FILE
    with _told(path):
        lines = []
        with path.open("rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)) and line != _HEAD_END.encode():
                lines.append(line)
        head = b"".join(lines)
        if b'"head_sha256": ' not in head:
            return read_manifest(directory).state  # of format 1 or 2, or damaged
        values = _verified_head(head, path)
        _require_readable(values, path)
        return _decode_state(values)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of reading a manifest, in words."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path.parent} holds no complete checkpoint ({MANIFEST_FILE} is missing); name a "
            "step_* folder or a run folder that has one"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({type(error).__name__}: {error})") from None
    except ValueError as error:
        is_told = str(path.parent) in str(error)
        raise error if is_told else ValueError(f"{path}: {error}") from None


def _require_readable(values: dict[str, Any], path: Path) -> None:
    version = values.get("format")
    if version not in _READABLE:
        *others, last = map(str, _READABLE)
        raise ValueError(
            f"{path} has format {version}, this version of megagpt reads {', '.join(others)} and "
            f"{last}; use the version that wrote it"
        )


class Links(NamedTuple):
    """How a manifest names itself and others of its folder; see `CheckpointManifest`."""

    sha256: str
    created: str
    previous: str | None
    line: tuple[tuple[int, str], ...]


def read_links(directory: Path) -> Links | None:
    """The links of a step folder; None where they cannot be read.

    Reads the first lines only, for the manifest of many ranks is long, and compares no hash.
    """
    values: dict[str, Any] = {}
    try:
        with (directory / MANIFEST_FILE).open("rb") as file:
            for _ in range(_LINK_LINES):
                text = file.readline(_MAX_LINE_BYTES).decode().strip("{, \n")
                values |= decode_json(f"{{{text}}}")
        return _decode_links(values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verified(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON, if its hash is its own."""
    try:
        text = content.decode()
        values = decode_json(text)
        digest = values["sha256"]
        blank = text.replace(_DIGEST_KEY + digest, _DIGEST_KEY + _NO_DIGEST, 1)
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{path} is damaged: it is not a manifest") from None
    if hashlib.sha256(blank.encode()).hexdigest() != digest:
        raise DamagedCheckpoint(f"{path} is damaged: its content has not the hash that it names")
    return values


def _verified_head(head: bytes, path: Path) -> dict[str, Any]:
    """The JSON of the head, if the hash of the head is its own."""
    try:
        values = decode_json(head.decode().rstrip(", \n") + "}")
        text = head.decode()
        for key in ("sha256", "head_sha256"):
            text = text.replace(f'"{key}": "{values[key]}', f'"{key}": "{_NO_DIGEST}', 1)
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{path} is damaged: it is not a manifest") from None
    if hashlib.sha256(text.encode()).hexdigest() != values["head_sha256"]:
        raise DamagedCheckpoint(f"{path} is damaged: its head has not the hash that it names")
    return values


def _encode(manifest: CheckpointManifest) -> str:
    """One line for each tensor and file, so that a person can read it."""
    head = {
        "format": FORMAT,
        "sha256": _NO_DIGEST,
        "head_sha256": _NO_DIGEST,
        "created": manifest.created,
        "previous": manifest.previous,
        "line": manifest.line,
        "versions": dict(manifest.versions),
        "layout": dataclasses.asdict(manifest.layout),
        "state": dataclasses.asdict(manifest.state),
        "block_bytes": BLOCK_BYTES,
    }
    tensors = {
        name: {
            "shape": record.shape,
            "dtype": "F32",
            "boxes": [
                {"rows": box.rows, "columns": box.columns, "runs": box.runs} for box in record.boxes
            ],
        }
        for name, record in manifest.tensors.items()
    }
    files = {
        name: {"bytes": record.num_bytes, f"block_{record.hash_name}": record.block_hashes}
        for name, record in manifest.files.items()
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, entries in (("tensors", tensors), ("files", files)):
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        lines.append(f"{json.dumps(key)}: {{\n{rows}\n }}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _decode(values: dict[str, Any]) -> CheckpointManifest:
    if values["block_bytes"] != BLOCK_BYTES:
        raise KeyError(f"block_bytes {values['block_bytes']}")
    layout = Layout(**values["layout"])
    for size in (layout.world_size, layout.tensor_parallel_size, layout.pipeline_parallel_size):
        _whole_number(size, least=1)
    tensors = {name: _decode_tensor(entry) for name, entry in values["tensors"].items()}
    check_cover(tensors)
    return CheckpointManifest(
        state=_decode_state(values),
        layout=layout,
        tensors=tensors,
        files=FileTable(values["files"]),
        versions=values["versions"],
        **_decode_links(values)._asdict(),
    )


def _decode_state(values: dict[str, Any]) -> CheckpointState:
    state = dict(values["state"])
    for key in ("step", "consumed_samples", "consumed_tokens", "adam_step"):
        _whole_number(state[key])
    return CheckpointState(**state | {"config": config_from_dict(state["config"])})


def _decode_links(values: dict[str, Any]) -> Links:
    line = tuple((_whole_number(step), str(sha256)) for step, sha256 in values["line"])
    previous = None if values["previous"] is None else str(values["previous"])
    return Links(str(values["sha256"]), str(values["created"]), previous, line)


def _decode_tensor(entry: dict[str, Any]) -> TensorRecord:
    shape = tuple(_whole_number(size) for size in entry["shape"])
    if not 1 <= len(shape) <= 2 or entry["dtype"] != "F32":
        raise TypeError(f"shape {list(shape)} of {entry['dtype']}")
    if "pieces" in entry:  # of format 1 or 2
        return TensorRecord.of(shape, map(_decode_piece, entry["pieces"]))
    boxes = (
        Box(_pair(box["rows"]), _pair(box["columns"]), tuple(map(_decode_run, box["runs"])))
        for box in entry["boxes"]
    )
    return TensorRecord(shape, tuple(boxes))


def _decode_run(values: list[int]) -> Run:
    start, size, count, shard, step = map(_whole_number, values)
    return Run(start, _whole_number(size, least=1), _whole_number(count, least=1), shard, step)


def _decode_piece(values: dict[str, Any]) -> Piece:
    rows, columns = _pair(values["rows"]), _pair(values["columns"])
    start, end = _whole_number(values["start"]), _whole_number(values["end"])
    if end >= 1 << 48:
        raise TypeError(f"{end} is beyond any tensor")
    return Piece(_whole_number(values["shard"]), Slice(rows, columns, start, end))


def _pair(values: list[int]) -> tuple[int, int]:
    begin, end = map(_whole_number, values)
    return begin, end


def _whole_number(value: Any, *, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise TypeError(f"{value!r} is not a whole number of at least {least}")
    return value


def check_cover(tensors: Mapping[str, TensorRecord]) -> None:
    """Checks that the pieces of each tensor hold each of its elements once.

    Raises:
        ValueError: With the first tensor that they do not make up.
    """
    for name, record in tensors.items():
        if not record.is_whole:
            raise ValueError(f"the pieces of {name} do not hold each of its elements once")
