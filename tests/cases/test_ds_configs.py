"""DeepSpeed JSONs as other programs write them: how they are read, and where a refusal leads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config.deepspeed_config import resolve_ds_config
from megagpt.config.deepspeed_json import read_ds_config
from megagpt.config.deepspeed_keys import ACCEPTED_KEYS, REFUSED_KEYS, RENAMED_KEYS, Kind
from megagpt.config.schema import Config

INPUTS = Path(__file__).parent / "inputs" / "ds"


def paths(keys: dict[str, Kind], prefix: str = "") -> list[str]:
    found = []
    for name, kind in keys.items():
        found.append(f"{prefix}{name}")
        if isinstance(kind, dict):
            found += paths(kind, f"{prefix}{name}.")
    return found


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def problems(values: dict[str, Any]) -> str:
    """What is refused, or nothing."""
    try:
        resolve_ds_config(Config(), values, world_size=1, ds_config_path="", device="cpu")
    except ValueError as error:
        assert "\n" not in str(error) and not str(error).startswith(("default", ":"))
        return str(error)
    return ""


DRESSES = {
    "comment": '{{ // why\n "zero_optimization": {{"stage": {}}} # so\n /* and */ }}',
    "trailing comma": '{{"zero_optimization": {{"stage": {},}},}}',
    "byte order mark": '\ufeff{{"zero_optimization": {{"stage": {}}}}}',
    "no commas": '{{\n"zero_optimization": {{\n"stage": {}\n}}\n"bf16": "auto"\n}}',
    "no quotes": "{{zero_optimization: {{stage: {}\n}}}}",
}


@pytest.mark.parametrize("dress", DRESSES.values(), ids=DRESSES.keys())
def test_it_is_read_as_deepspeed_reads_it(dress: str, tmp_path: Path) -> None:
    import hjson

    path = tmp_path / "ds.json"
    path.write_text(dress.format(2), encoding="utf-8")
    assert read_ds_config(str(path)) == hjson.loads(path.read_text())
    assert read_ds_config(str(path))["zero_optimization"] == {"stage": 2}
    path.write_text(dress.format('2, "stage": 3'), encoding="utf-8")
    if "{stage" not in dress:
        with pytest.raises(ValueError, match="gives the key 'stage' twice"):
            read_ds_config(str(path))


@pytest.mark.parametrize("path", [*paths(ACCEPTED_KEYS), *REFUSED_KEYS])
def test_null_is_not_given(path: str) -> None:
    assert problems({"zero_optimization": {"stage": 1}} | nested(path, None)) == problems(
        {} if path.startswith("zero_optimization") else {"zero_optimization": {"stage": 1}}
    )


@pytest.mark.parametrize("path", [p for p in paths(ACCEPTED_KEYS) if "." in p])
def test_a_key_in_the_wrong_place_is_told_its_own(path: str) -> None:
    name = path.rpartition(".")[2]
    if name not in ACCEPTED_KEYS:
        assert f"'{path}'" in problems({name: 1})
    if path.startswith("aio.") or name in ("type", "params"):
        assert f"'{path}'" in problems({"zero_optimization": {name: 1}})


@pytest.mark.parametrize("name", list(ACCEPTED_KEYS))
def test_a_key_of_the_top_within_zero_is_told_so(name: str) -> None:
    message = problems({"zero_optimization": {name: {}}})
    assert f"unknown key 'zero_optimization.{name}'; did you mean" in message
    assert f"'{name}'" in message


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_told_its_new_name(old: str, new: str) -> None:
    assert f"unknown key '{old}'; did you mean '{new}'" in problems({old: 1})
    assert new in [*paths(ACCEPTED_KEYS), *REFUSED_KEYS]


@pytest.mark.parametrize("path", REFUSED_KEYS)
@pytest.mark.parametrize("off", [False, {"enabled": False}], ids=str)
def test_no_remedy_turns_on_what_is_off(path: str, off: Any) -> None:
    message = problems(nested(path, off))
    told = message.split(f"{path} is refused: ")[1]
    assert "remove" in told


def test_the_files_of_the_report() -> None:
    told = {path.stem: problems(read_ds_config(str(path))) for path in sorted(INPUTS.iterdir())}
    assert [name for name, text in told.items() if not text] == [
        "accelerate2",
        "comments",
        "trailing_comma",
    ]
    assert "'zero_optimization.offload_optimizer'" in told["top_offload"]
    assert "did you mean 'aio' at the top level?" in told["aio_inside"]
    assert "off already; remove it" in told["neox"]
    assert "give --optimizer.schedule constant" in told["hf_zero3"]
    assert ":=" not in json.dumps(told)
