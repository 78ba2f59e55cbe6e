"""Files that are whole or not there, their hashes, and JSON that is whatever it may be."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def decode_json(content: bytes | str) -> Any:
    """What JSON says; whatever is wrong with it, and whatever Python cannot hold, a ValueError.

    Bytes are UTF-8. Python's own reader ends with other errors where brackets are nested some
    thousand deep, and with one that names no place where a number has more than 4,300 digits.

    Raises:
        ValueError: With the reason, which names the place where there is one.
    """
    try:
        return json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError(NESTED_TOO_DEEPLY) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError(NUMBER_TOO_LONG) from None


NESTED_TOO_DEEPLY = "its brackets are nested too deeply"
NUMBER_TOO_LONG = "a whole number has more than 4,300 digits"


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_atomically(path, encode_json(content))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file under a temporary name and renames it; durable when it returns."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            flush_to_disk(file)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def encode_json(content: Any) -> bytes:
    """Content as this project writes it; JSON has no number for "nan", "inf" and "-inf"."""
    text = json.dumps(_named(content), indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _named(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _named(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_named(value) for value in content]
    is_number = isinstance(content, float)
    return str(content) if is_number and not math.isfinite(content) else content


def sync_directory(directory: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_to_disk(file: BinaryIO) -> None:
    """Makes what was written to a file durable."""
    file.flush()
    os.fsync(file.fileno())
