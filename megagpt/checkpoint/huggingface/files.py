"""Folders of Hugging Face's transformers: safetensors read and written one tensor at a time.

Knows nothing of our checkpoints; no pickle is ever opened. Next file: `convert.py`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from megagpt.checkpoint.directory import publish, staging_directory
from megagpt.checkpoint.format.shard_file import safetensors_header
from megagpt.files import decode_json, flush_to_disk

TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_SAFETENSORS_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when all is written, or goes."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already; name another --output, or remove it")
    staging = staging_directory(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file, durable when it returns."""
    with path.open("xb") as file:
        file.write(data)
        flush_to_disk(file)


class HuggingFaceFolder:
    """An open folder of transformers, with config.json and safetensors; a context manager.

    Raises:
        ValueError: If it has none, or is inconsistent.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_json(directory / "config.json")
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}  # file of each tensor
        self._open_files = ExitStack()

    def __enter__(self) -> HuggingFaceFolder:
        with self._open_files as on_error:
            for file in _weight_files(self.directory):
                self._open(file)
            self._open_files = on_error.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def _open(self, file: str) -> None:
        path = self.directory / file
        try:
            opened = safetensors.safe_open(path, "pt")
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; fetch the folder again") from None
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file ({error}); fetch it again"
            ) from None
        self._files[file] = self._open_files.enter_context(opened)
        for name in self._files[file].keys():
            if self._places.setdefault(name, file) != file:
                raise ValueError(f"{self.directory} has {name} twice; fetch the folder again")

    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._places)

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor, the type in safetensors' words."""
        part = self._files[self._places[name]].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def tensor(self, name: str, *, part: int = 0, num_parts: int = 1) -> torch.Tensor:
        """A tensor in the type of the file, or one of several equal parts of its last dim."""
        values = self._files[self._places[name]].get_slice(name)
        *rows, columns = values.get_shape()
        width = columns // num_parts
        mine = slice(part * width, (part + 1) * width)
        return values[:, mine] if rows else values[mine]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = decode_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; give a folder that transformers' save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it again")
    return values


def _weight_files(directory: Path) -> list[str]:
    """Names of the files with the weights; refuses pickles, which run code when they are opened."""
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{directory / INDEX_FILE} has no weight_map; fetch it again")
        files = sorted({str(name) for name in weight_map.values()})
    elif (directory / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        files = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
        if not files:
            raise ValueError(
                f"{directory} holds no weights ({SINGLE_FILE} or {INDEX_FILE}); fetch it whole"
            )
    for name in files:
        if Path(name).suffix in _PICKLES:
            raise ValueError(
                f"{directory / name} is a pickle, which can run any code when it is opened, and is "
                "not read; if you trust it, convert it to safetensors with transformers' "
                "save_pretrained"
            )
        if Path(name).name != name:
            raise ValueError(
                f"{directory / INDEX_FILE} names {name}, outside of its folder; fetch it again"
            )
    return files


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
) -> None:
    """Writes a file, never holding more than one of its tensors.

    Args:
        path: Must not exist.
        shapes: Of the tensors by name.
        read: Gives a tensor by name, float32 and contiguous.
        dtype: fp32, bf16 or fp16; values are rounded to the nearest.

    Raises:
        ValueError: If a finite value is beyond the type.
    """
    kind = _SAFETENSORS_NAMES[dtype]
    entries = {name: (kind, shape, num_bytes(shape, dtype)) for name, shape in shapes.items()}
    with path.open("xb") as file:
        # transformers asks for the metadata
        file.write(safetensors_header(entries, __metadata__={"format": "pt"}))
        for name in shapes:
            file.write(_encoded(read(name), name, dtype).data.cast("B"))
        flush_to_disk(file)


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor in a file."""
    return math.prod(shape) * TORCH_TYPES[dtype].itemsize


def _encoded(values: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """Contiguous values in a type, rounded to the nearest; numpy has no bf16, so as whole numbers.

    Raises:
        ValueError: If a finite value is beyond the type.
    """
    if dtype == "fp32":
        return values
    rounded = torch.from_numpy(values).to(TORCH_TYPES[dtype])
    if dtype == "fp16":
        largest = float(np.abs(values).max())
        if np.isfinite(largest) and not rounded.isfinite().all():
            raise ValueError(
                f"{name} has a value of {largest:.4g}, fp16 ends at 65504; export with --dtype "
                "bf16 or fp32"
            )
    return rounded.view(torch.int16).numpy()
