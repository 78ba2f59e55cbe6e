"""The DeepSpeed JSON as DeepSpeed reads it: Hjson, which is JSON with comments and loose commas.

Next file: `deepspeed_config.py`, which checks what it says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hjson

from megagpt.files import NESTED_TOO_DEEPLY, NUMBER_TOO_LONG


def read_ds_config(path: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON as DeepSpeed does: with comments, and commas at the end or left out.

    Raises:
        ValueError: If it is not one object of Hjson, or a key stands twice in it.
        OSError: If it cannot be read.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"{path} gives the key '{key}' twice; keep one of them")
            values[key] = value
        return values

    def whole_number(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{path} is not valid JSON: {NUMBER_TOO_LONG}; correct it") from None

    def number(text: str) -> int | float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{path} holds {text}, which is too large; give a smaller number")
        return int(value) if value.is_integer() else value

    try:
        values = hjson.loads(
            Path(path).read_text(encoding="utf-8-sig"),
            object_pairs_hook=no_duplicates,
            parse_int=whole_number,
            parse_float=number,
        )
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; name a JSON file for --ds_config") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: {NESTED_TOO_DEEPLY}; correct it") from None
    except hjson.HjsonDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} column {error.colno} is not valid JSON: {error.msg}; "
            "correct it"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, not an object; write {{...}} around its keys"
        )
    return values
