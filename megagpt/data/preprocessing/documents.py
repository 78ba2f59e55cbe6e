"""Input files to documents: JSON lines (one document a line) or plain text (one a file).

Files are read line by line, so that memory is bounded by the largest document; .gz and .zst are
unpacked on the way. What is wrong in a document is a `BadDocument` with its line.
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from megagpt.files import decode_json

COMPRESSIONS = (".gz", ".zst")
_READ_BYTES = 1 << 20
_PACKED_BYTES = 1 << 16  # unpacked at once: text seldom packs to less than a hundredth
_LARGEST_WINDOW = 1 << 31  # of zstd --long=31, its largest; taken as far as the frame asks
_BOM = b"\xef\xbb\xbf"
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text"}


@dataclass(frozen=True)
class Part:
    """The documents of one file that begin in a range of its bytes."""

    path: str
    file_format: str
    """`jsonl` or `text`."""
    begin: int
    end: int
    """A packed file is one part, from 0 to its packed size."""
    is_last: bool = True
    """Whether the file ends with it."""

    @property
    def is_packed(self) -> bool:
        """Whether the file must be unpacked to be read."""
        return Path(self.path).suffix.lower() in COMPRESSIONS


class BadDocument(ValueError):
    """A document that cannot be encoded.

    Attributes:
        reason: One of a few, to be counted by.
        line: Line in the record, from 1.
    """

    def __init__(self, reason: str, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = line


def expand_inputs(patterns: Sequence[str | Path]) -> list[str]:
    """Files of names and globs; those of a glob in the order of their names.

    Raises:
        ValueError: If there is none, a name or glob stands for no file, or a file comes twice.
    """
    paths: list[str] = []
    for pattern in map(str, patterns):
        is_glob = glob.has_magic(pattern) and not Path(pattern).exists()
        found = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        files = [path for path in found if Path(path).is_file()]
        if not files:
            raise ValueError(f"input {pattern} is not a file; name existing JSONL or text files")
        paths += files
    if not paths:
        raise ValueError("no input is named; give at least one JSONL or text file")
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"input {path} is named twice; name each file once")
        seen.add(path)
    return paths


def resolve_format(path: str | Path, file_format: str) -> str:
    """`jsonl` or `text` for a file, by its suffix under `auto`.

    Raises:
        ValueError: If the suffix says neither.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else "none"
    if suffix in (".bz2", ".xz", ".zip", ".tar", ".parquet"):
        raise ValueError(
            f"input {path} is {suffix[1:]}, which is not read; make it .jsonl or .txt, plain or "
            "packed as .gz or .zst"
        )
    if file_format != "auto":
        return file_format
    if suffix not in _FORMATS:
        raise ValueError(
            f"input {path} has suffix {suffix}, known are {', '.join(_FORMATS)}; "
            "give --format jsonl or --format text"
        )
    return _FORMATS[suffix]


def split_file(path: str, file_format: str, part_bytes: int) -> list[Part]:
    """A file as parts that can be read apart: ranges of a JSONL file, else the whole file."""
    size = Path(path).stat().st_size
    whole = Part(path, file_format, 0, size)
    if file_format == "text" or whole.is_packed:
        return [whole]
    begins = range(0, max(size, 1), part_bytes)
    return [
        Part(path, file_format, b, min(b + part_bytes, size), is_last=b + part_bytes >= size)
        for b in begins
    ]


def read_records(part: Part) -> Iterator[bytes]:
    """The lines (of JSONL) or the text of a part, as bytes, without a byte order mark.

    Raises:
        ValueError: If a packed file is damaged.
    """
    with open(part.path, "rb") as file:
        if part.file_format == "text":
            text = b"".join(_unpacked(part.path, file)) if part.is_packed else file.read()
            yield text.removeprefix(_BOM)
            return
        if part.begin:
            # A line belongs to the part that its first byte is in.
            file.seek(part.begin - 1)
            file.readline()
        position = file.tell()
        for line in _lines(_unpacked(part.path, file)) if part.is_packed else file:
            if position >= part.end and not part.is_packed:
                break
            yield line if position else line.removeprefix(_BOM)
            position += len(line)


def record_text(record: bytes, part: Part, json_key: str) -> str:
    """The text of a record; blank where there is none.

    Raises:
        BadDocument: For invalid UTF-8 or JSON, or a missing key.
    """
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise BadDocument(
            "invalid UTF-8",
            f"invalid UTF-8 (byte 0x{record[error.start]:02x}); convert the file to UTF-8",
            record.count(b"\n", 0, error.start) + 1,
        ) from error
    if part.file_format == "text" or not record.strip():
        return text
    try:
        value = decode_json(text)
    except ValueError as error:
        detail = getattr(error, "msg", error)
        raise BadDocument(
            "invalid JSON",
            f"invalid JSON ({detail}); each line must be a JSON object, mend or remove it",
        ) from error
    if not isinstance(value, dict):
        raise BadDocument(
            "no JSON object",
            f"{type(value).__name__} instead of a JSON object; write "
            f'{{"{json_key}": ...}} on each line',
        )
    if json_key not in value:
        keys = ", ".join(sorted(value)) or "none"
        raise BadDocument(
            f'no key "{json_key}"',
            f'no key "{json_key}" (keys: {keys}); name the text with --json_key',
        )
    text = value[json_key]
    if not isinstance(text, str):
        raise BadDocument(
            "no string",
            f'key "{json_key}" is {type(text).__name__}, must be a string; mend it or name '
            "another --json_key",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(
            "lone surrogate",
            f"a lone surrogate at character {error.start} is not Unicode; mend the line",
        ) from error
    return text


def read_documents(
    paths: Sequence[str | Path],
    *,
    file_format: str = "auto",
    json_key: str = "text",
    on_bad: Callable[[str, BadDocument], None] | None = None,
) -> Iterator[str]:
    """All documents of files, those without text left out.

    Args:
        paths: Files or globs.
        file_format: `jsonl`, `text`, or `auto` for by suffix.
        json_key: Key of the text in JSONL.
        on_bad: Receives each bad document, with its place and fault in words, and its error;
            default: the first one is raised.

    Raises:
        ValueError: For what is wrong in a file, with `file:line`.
    """
    for path in expand_inputs(paths):
        part = Part(path, resolve_format(path, file_format), 0, Path(path).stat().st_size)
        for number, record in enumerate(read_records(part)):
            try:
                text = record_text(record, part, json_key)
            except BadDocument as error:
                told = f"{path}:{number + error.line}: {error}"
                if on_bad is None:
                    raise ValueError(told) from error
                on_bad(told, error)
                continue
            if text and not text.isspace():
                yield text


def _unpacked(path: str, file: IO[bytes]) -> Iterator[bytes]:
    """What a packed file holds; what is wrong in it is a ValueError with its name."""
    try:
        if Path(path).suffix.lower() == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
            while content := unpacked.read1(_READ_BYTES):
                yield content
            return
        unpacker = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        frame = None
        while packed := file.read(_PACKED_BYTES):
            while packed:
                frame = frame or unpacker.decompressobj()
                yield frame.decompress(packed)
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
        if frame is not None:  # zstandard itself takes a cut frame for a short one
            raise EOFError("it ends inside a frame")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the content's
            raise OSError(error.errno, error.strerror, path) from error
        if "memory" in str(error):  # zstandard's word for a window above its bound
            raise ValueError(
                f"input {path} needs a window of more than {_LARGEST_WINDOW >> 30} GiB to be "
                f"unpacked ({error}); pack it again with zstd --long=31 or less"
            ) from error
        raise ValueError(
            f"input {path} is cut off or damaged ({error}); fetch or pack it again"
        ) from error


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for block in blocks:
        for piece in io.BytesIO(block):
            begun.append(piece)
            if piece.endswith(b"\n"):
                yield b"".join(begun)
                begun = []
    if begun:
        yield b"".join(begun)
