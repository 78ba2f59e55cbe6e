"""The walker over dotted keys: types, objects and mappings; and the hint with the nearest key."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megagpt.config.dotted_keys import Setting, did_you_mean, leaves


@dataclass(frozen=True)
class Inner:
    size: int = 1
    """How large."""
    weights: dict[str, float] | None = None
    bare: bool = True


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str = "a"
    """What it is called."""


def test_a_type_gives_type_default_and_docstring_of_each_field_in_order():
    found = leaves(Outer)
    assert list(found) == ["inner.size", "inner.weights", "inner.bare", "name"]
    assert found["inner.size"] == Setting(int, 1, "How large.")
    assert found["inner.bare"].help == "" and found["name"].help == "What it is called."


def test_an_object_gives_values_of_which_one_may_be_a_mapping():
    found = leaves(Outer(Inner(weights={"a": 0.5})))
    assert found == {
        "inner.size": 1,
        "inner.weights": {"a": 0.5},
        "inner.bare": True,
        "name": "a",
    }


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (None, {"a.b.c": 1, "a.d": [2], "f": None}),
        (["a"], {"a.b": {"c": 1}, "a.d": [2], "e": {}, "f": None}),
        ([], {"a": {"b": {"c": 1}, "d": [2]}, "e": {}, "f": None}),
    ],
)
def test_mappings_are_walked_into_wholly_or_only_where_named(sections, expected):
    tree = {"a": {"b": {"c": 1}, "d": [2]}, "e": {}, "f": None}
    assert leaves(tree, sections=sections) == expected


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.hiden_size", "; did you mean '--model.hidden_size'?"),
        ("hidden_size", "; did you mean '--model.hidden_size'?"),
        ("loss.hidden_size", "; did you mean '--model.hidden_size'?"),
        ("monitoring.enabled", "; did you mean '--bf16.enabled'?"),  # of two equal names the first
        ("zzz", ""),
    ],
)
def test_the_nearest_key_is_named_and_if_its_section_is_wrong_that_of_the_same_name(key, hint):
    known = ["model.hidden_size", "optimizer.lr", "bf16.enabled", "fp16.enabled"]
    assert did_you_mean(key, iter(known), "--") == hint
