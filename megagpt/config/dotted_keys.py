"""Nested settings by their dotted keys: one walker over dataclasses, YAML and DeepSpeed JSONs.

Knows no setting by name. Next file: `command_line.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A field of a dataclass."""

    type: Any
    default: Any
    help: str
    """The string under the field."""


def leaves(tree: Any, *, sections: Container[str] | None = None) -> dict[str, Any]:
    """Everything that is no section itself, by its dotted key and in order.

    Args:
        tree: Nested mappings; or a dataclass of dataclasses, whose type gives the `Setting` of each
            field and whose object gives the values, of which one may be a mapping.
        sections: Keys of the mappings to go into; all of them if left out.
    """
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        is_mapping = isinstance(node, Mapping)
        for name, child in node.items() if is_mapping else _fields(node):
            key = f"{prefix}{name}"
            if is_mapping:
                is_section = isinstance(child, Mapping) and (sections is None or key in sections)
            else:
                is_section = dataclasses.is_dataclass(child)
            if is_section:
                walk(child, f"{key}.")
            else:
                found[key] = child

    walk(tree, "")
    return found


def did_you_mean(key: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint with the nearest of the known keys, or an empty text."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    if not near:
        # The name may be right and its section wrong or forgotten.
        by_name = {k.rpartition(".")[2]: k for k in reversed(known)}
        names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.8)
        near = [by_name[name] for name in names]
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


def _fields(owner: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of each field of an object; of a type, its section or `Setting`."""
    if not isinstance(owner, type):
        yield from ((f.name, getattr(owner, f.name)) for f in dataclasses.fields(owner))
        return
    types, texts = typing.get_type_hints(owner), _docstrings(owner)
    for field in dataclasses.fields(owner):
        kind = types[field.name]
        is_section = dataclasses.is_dataclass(kind)
        setting = Setting(kind, field.default, texts.get(field.name, ""))
        yield field.name, kind if is_section else setting


def _docstrings(owner: type) -> dict[str, str]:
    """The string under each field, which Python itself does not keep."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(owner)).body[0]).body
    return {
        field.target.id: str(text.value.value)
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
