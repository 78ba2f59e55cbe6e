"""Input files to documents: JSON lines (one document a line) or plain text (one a file).

Files are read in chunks, so that memory is bounded by the largest document; what is wrong in one
is reported as `file:line`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.manifest import Source

CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text"}


@dataclass(frozen=True)
class Chunk:
    """Some documents of one file, still as bytes."""

    path: str
    file_format: str
    first_line: int
    """Line number of lines[0], from 1."""
    lines: list[bytes]
    """Lines of JSON, or one whole text."""
    num_bytes: int


def resolve_format(path: str | Path, file_format: str) -> str:
    """`jsonl` or `text` for a file, by its suffix under `auto`.

    Raises:
        ValueError: If the file is missing or the suffix says neither.
    """
    if not Path(path).is_file():
        raise ValueError(f"input {path} is not a file; name existing JSONL or text files")
    suffix = Path(path).suffix.lower()
    if suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".parquet"):
        raise ValueError(
            f"input {path} is {suffix[1:]}, which is not read; unpack it to .jsonl or .txt"
        )
    if file_format != "auto":
        return file_format
    if suffix not in _FORMATS:
        raise ValueError(
            f"input {path} has suffix {suffix or 'none'}, known are {', '.join(_FORMATS)}; "
            "give --format jsonl or --format text"
        )
    return _FORMATS[suffix]


def read_chunks(path: str | Path, file_format: str, sources: list[Source]) -> Iterator[Chunk]:
    """Chunks of about CHUNK_BYTES or one document; at the end the file's hash joins sources."""
    digest = hashlib.sha256()
    total = 0
    with Path(path).open("rb") as file:
        if file_format == "text":
            content = file.read()
            digest.update(content)
            total = len(content)
            yield Chunk(str(path), file_format, 1, [content.removeprefix(_BOM)], total)
        else:
            lines: list[bytes] = []
            size, first_line = 0, 1
            for line in file:
                digest.update(line)
                total += len(line)
                size += len(line)
                lines.append(line.removeprefix(_BOM) if total == len(line) else line)
                if size >= CHUNK_BYTES:
                    yield Chunk(str(path), file_format, first_line, lines, size)
                    first_line += len(lines)
                    lines, size = [], 0
            if lines:
                yield Chunk(str(path), file_format, first_line, lines, size)
    sources.append(Source(str(path), total, digest.hexdigest()))


def chunk_documents(chunk: Chunk, json_key: str) -> Iterator[str]:
    """Documents of a chunk, in order; one without text is an empty string.

    Raises:
        ValueError: For invalid UTF-8 or JSON, or a missing key, with `file:line`.
    """
    for number, raw in enumerate(chunk.lines, start=chunk.first_line):
        if chunk.file_format == "jsonl":
            yield _json_text(raw, json_key, f"{chunk.path}:{number}")
        else:
            yield _decode(raw, chunk.path)


def read_documents(
    paths: Sequence[str | Path], *, file_format: str = "auto", json_key: str = "text"
) -> Iterator[str]:
    """All documents of files, those without text left out.

    Raises:
        ValueError: For what is wrong in a file.
    """
    for path in paths:
        for chunk in read_chunks(path, resolve_format(path, file_format), []):
            yield from (text for text in chunk_documents(chunk, json_key) if text.strip())


def _json_text(raw: bytes, key: str, place: str) -> str:
    if not raw.strip():
        return ""
    line = _decode(raw, place)
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(
            f"{place}: invalid JSON ({reason}); each line must be a JSON object, mend or remove it"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: {type(record).__name__} instead of a JSON object; write "
            f'{{"{key}": ...}} on each line'
        )
    if key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise ValueError(f'{place}: no key "{key}" (keys: {keys}); name the text with --json_key')
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(
            f'{place}: key "{key}" is {type(text).__name__}, must be a string; mend it or name '
            "another --json_key"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: a lone surrogate at character {error.start} is not Unicode; mend the line"
        ) from error
    return text


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if ":" not in place.rsplit("/", 1)[-1]:
            line = raw.count(b"\n", 0, error.start) + 1
            place = f"{place}:{line}"
        raise ValueError(
            f"{place}: invalid UTF-8 (byte 0x{raw[error.start]:02x}); convert the file to UTF-8"
        ) from error
