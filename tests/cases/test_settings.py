"""What people write in run configurations: empty keys, words of YAML 1.1, wrong types, giants.

The members are all settings of the schema, and all types of it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megagpt.config.command import UsageError
from megagpt.config.command_line import config_from_dict, parse_config
from megagpt.config.dotted_keys import leaves
from megagpt.config.schema import Config
from megagpt.config.yaml_text import alternatives

INPUTS = Path(__file__).parent / "inputs"
SETTINGS = leaves(Config)
MAY_BE_EMPTY = {key for key, each in SETTINGS.items() if type(None) in alternatives(each.type)}
TYPES = {str(each.type): key for key, each in SETTINGS.items()}


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        parse_config(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def nested(key: str, value: object) -> dict:
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_a_key_with_nothing_behind_it_is_named(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    path = written(tmp_path, f"{section}:\n  {name}:\n" if section else f"{name}:\n")
    if key in MAY_BE_EMPTY:
        assert parse_config(["--config", path])[0] == Config()
        assert config_from_dict(nested(key, None)) == Config()
        return
    message = refusal(["--config", path])
    assert message.startswith(f"{key} has nothing behind it in {path}; give ")
    with pytest.raises(ValueError, match=f"^{re.escape(key)} has nothing behind it in the saved"):
        config_from_dict(nested(key, None))


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_a_flag_with_an_empty_text_is_named(key: str) -> None:
    assert f"{key} has nothing behind it" in refusal([f"--{key}="])


def test_the_inputs_of_the_report_are_named() -> None:
    for name, key in (("pos", "position_embedding"), ("tie", "tie_embeddings"), ("micro", "micro")):
        assert key in refusal(["--config", str(INPUTS / f"empty_{name}.yaml")])


@pytest.mark.parametrize("key", TYPES.values(), ids=TYPES.keys())
def test_what_a_refusal_tells_to_write_is_taken(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, "")
    message = refusal(
        [
            "--config",
            written(
                tmp_path,
                f"{key.replace('.', ': {', 1)}: [[1]]}}" if "." in key else f"{key}: [[1]]",
            ),
        ]
    )
    told = message.split("; give ")[1]
    examples = re.findall(r"such as ([\[{].*?[\]}]|[^ ]+)", told)
    for choices in re.findall(r"one of ([\w, ]+)", told):
        examples += choices.split(", ")
    examples += ["true", "false"] * ("true or false" in told)
    assert examples, message
    for example in examples:
        section, _, name = key.rpartition(".")
        text = f"{section}:\n  {name}: {example}\n" if section else f"{name}: {example}\n"
        Path(path).write_text(text)
        try:
            parse_config(["--config", path])
        except ValueError as error:
            # Its type is right; with the other settings' defaults it need not fit.
            assert "type" not in str(error) and "nothing behind" not in str(error), example


def test_a_text_for_a_list_is_shown_in_brackets() -> None:
    message = refusal(["--checkpoint.override", "optimizer.lr"])
    assert message.endswith("give a list such as [optimizer.lr] or null")


WORDS = ("no", "off", "y", "null", "007", "1e3", "2026-01-01", "1:30", "0x1f", "3.0", "1_000", "~")


@pytest.mark.parametrize("word", WORDS)
def test_keys_and_paths_are_the_text_that_stands_there(word: str, tmp_path: Path) -> None:
    if word not in ("null", "~"):
        data = f"{{path: {word}, train_path: null}}"
        path = written(tmp_path, f"data: {data}\noutput_dir: {word}\n")
        config = parse_config(["--config", path])[0]
        assert (config.data.path, config.output_dir) == (word, word)
        path = written(tmp_path, f"data: {{path: [{word}, b], valid_sets: {{{word}: {word}}}}}")
        config = parse_config(["--config", path])[0]
        assert config.data.path == [word, "b"] and config.data.valid_sets == {word: word}
        flags = parse_config([f"--data.path=[{word}]", f"--data.valid_sets={{{word}: {word}}}"])[0]
        assert flags.data.path == [word] and flags.data.valid_sets == {word: word}
    for arguments in (
        ["--config", written(tmp_path, f"data: {{path: {{{word}: 2, b: 1e0}}}}")],
        [f"--data.path={{{word}: 2, b: 1.0}}"],
    ):
        assert parse_config(arguments)[0].data.path == {word: 2.0, "b": 1.0}


def test_norway_is_a_name() -> None:
    config = parse_config(["--config", str(INPUTS / "norway.yaml")])[0]
    assert config.data.valid_sets == {"no": "d/ok", "en": "d/ok"}


WHOLE = [key for key, each in SETTINGS.items() if int in alternatives(each.type)]
DEEP = ("[" * 20_000, '{"a": ' * 20_000)
GIANTS = [(key, "9" * digits) for key in WHOLE for digits in (30, 5000)]
GIANTS += [(key, deep) for key in TYPES.values() for deep in DEEP]


@pytest.mark.parametrize(("key", "giant"), GIANTS, ids=lambda text: text[:40])
def test_giants_are_one_short_line(key: str, giant: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        parse_config([f"--{key}={giant}"])
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: {giant}\n" if section else f"{name}: {giant}\n"
    assert len(refusal(["--config", written(tmp_path, text)])) < 500
