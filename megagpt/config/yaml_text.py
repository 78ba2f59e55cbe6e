"""YAML to values, where a key is text and a plain word keeps the text that stands in the file.

YAML 1.1 reads `no` as false, `007` as 7 and `2026-01-01` as a date. What a word means is for the
setting's type to say, which is known only later. Next file: `command_line.py`.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from megagpt.files import NESTED_TOO_DEEPLY, NUMBER_TOO_LONG


class Word(NamedTuple):
    """A plain word that YAML takes for something else than text."""

    text: str
    """As it stands there."""
    value: Any
    """A number, a truth value or a date."""

    def __repr__(self) -> str:
        return self.text


def read_yaml(path: str) -> Any:
    """What a YAML file holds: mappings with keys of text, lists, text, None and `Word`s.

    Raises:
        ValueError: If it is not UTF-8 or not YAML, or gives a key twice.
        OSError: If it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; name a YAML file for --config") from None
    return parse_yaml(text, where=path)


def parse_yaml(text: str, *, where: str) -> Any:
    """The same of a text.

    Args:
        text: The YAML.
        where: Where it stands, for messages.

    Raises:
        ValueError: As `read_yaml`.
    """
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506
        fit(tree, None)  # ends nowhere, where a list is in itself
        return tree
    except RecursionError:
        raise ValueError(f"{where} is not valid YAML: {NESTED_TOO_DEEPLY}; correct it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}{line} is not valid YAML: {problem}; correct it") from None


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of anything else, itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def fit(node: Any, kind: Any) -> Any:
    """The values of what stands there: a word as its text, where the type takes text.

    Args:
        node: As `read_yaml` gives it; plain values stay as they are.
        kind: The type.
    """
    options = alternatives(kind)
    if isinstance(node, Word):
        takes_text = any(o is str or typing.get_origin(o) is typing.Literal for o in options)
        return node.text if takes_text else node.value
    if not isinstance(node, (dict, list)):
        return node
    shapes = (dict,) if isinstance(node, dict) else (list, tuple)
    item = next((typing.get_args(o)[-1] for o in options if typing.get_origin(o) in shapes), None)
    if isinstance(node, dict):
        return {key: fit(value, item) for key, value in node.items()}
    return [fit(value, item) for value in node]


class _Loader(yaml.SafeLoader):
    """Gives `Word`s, and refuses a key that stands twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key is not text", key)
            if key.value in seen:
                raise _problem(f"key '{key.value}' is given twice", key)
            seen.add(key.value)
        self.flatten_mapping(node)  # what `<<` takes in comes first, so that own keys win
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def word(self, node: yaml.ScalarNode) -> Word | str:
        """A plain word; of what starts with 0, which YAML 1.1 reads in base 8, the text."""
        kind = node.tag.rpartition(":")[2]
        digits = node.value.lstrip("+-").replace("_", "")
        if kind == "int" and digits.isdigit() and digits[0] == "0" != digits:
            return node.value
        try:
            return Word(node.value, getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(self, node))
        except ValueError:
            if kind == "int" and len(digits) > 4300:
                raise _problem(NUMBER_TOO_LONG, node) from None
            return node.value  # as 2026-13-45, which is no date


def _problem(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


for _kind in ("bool", "int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.word)
