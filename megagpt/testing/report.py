"""What suites and benchmarks print and write: tables, JSON files, the generated part of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megagpt.files import encode_json


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a header, without an end of line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---" for _ in header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write_records(path: Path | None, records: Any) -> None:
    """Writes records as JSON, if a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_json(records))


def replace_table(page: Path, name: str, table: str) -> None:
    """Puts a table between `<!-- NAME -->` and `<!-- end of NAME -->` of a page.

    Raises:
        ValueError: If the page does not hold both marks.
    """
    head, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->\n")
    if not begin or not end:
        raise ValueError(f"{page} does not hold the marks of the table '{name}'; put them back")
    page.write_text(f"{head}{begin}{table}\n{end}{tail}")
