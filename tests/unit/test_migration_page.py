"""The page for those who come from Megatron-DeepSpeed: what stands under *ours* is there."""

import dataclasses
import re
from pathlib import Path

import pytest

from megagpt.config.command_line import parse_config
from megagpt.config.deepspeed_keys import ACCEPTED_KEYS, REFUSED_KEYS
from megagpt.config.presets import PRESETS
from megagpt.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming-from-megatron-deepspeed.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def settings(owner=Config, prefix=""):
    """Every setting with its default, by dotted key."""
    for field in dataclasses.fields(owner):
        factory = field.default_factory
        if dataclasses.is_dataclass(factory):
            yield from settings(factory, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.default


SETTINGS = dict(settings())
SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}


def tables():
    """Each table of the page: its heading, its column names, and its rows as lists of cells."""
    for heading, body in re.findall(r"^##+ (.+)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE):
        for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
            names, _, *rows = (
                [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in block.splitlines()
            )
            yield heading, names, rows


def column(heading, name):
    return [
        row[names.index(name)]
        for title, names, rows in tables()
        if title == heading and name in names
        for row in rows
    ]


def ours():
    """All of the page but what stands in its first columns, which is theirs, and in blocks."""
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^\|.*\n", "", prose, flags=re.MULTILINE)
    cells = [cell for _, _, rows in tables() for row in rows for cell in row[1:]]
    return [code for text in [prose, *cells] for code in CODE.findall(text)]


def test_tables_have_as_many_cells_as_columns():
    assert len(list(tables())) > 12
    for heading, names, rows in tables():
        for row in rows:
            assert len(row) == len(names), (heading, row)


def test_settings_exist():
    named = set()
    for code in ours():
        key = code.removeprefix("--").partition(":")[0].partition(" ")[0]
        if key.partition(".")[0] in SECTIONS and re.fullmatch(r"\w+\.\w+", key):
            named.add(key)
    assert len(named) > 50
    assert named <= SETTINGS.keys()


def test_named_choices_are_choices():
    choices = set(re.findall(r"`(\w+\.\w+: \w+)`", PAGE))
    assert len(choices) > 8
    for choice in choices:
        key, value = choice.split(": ")
        parse_config(["--config", "launch/demo.yaml", f"--{key}={value}"])


def test_defaults_are_those_of_the_schema():
    heading = "Flags that you left out"
    stated = zip(column(heading, "ours"), column(heading, "left out here"), strict=True)
    for setting, default in stated:
        (key,) = CODE.findall(setting)
        value = SETTINGS[key]
        shown = str(list(value) if isinstance(value, tuple) else value)
        if key != "model.ffn_hidden_size":
            assert CODE.findall(default) == [shown], key


def test_each_flag_of_theirs_stands_in_one_row_and_those_of_the_script_do():
    flags = [
        flag
        for heading, names, rows in tables()
        if names == ["theirs", "ours", "note"] and heading not in ("Scripts", "Files")
        for row in rows
        for flag in re.findall(r"`(--[\w-]+)`", row[0])
    ]
    assert {flag for flag in flags if flags.count(flag) > 1} == set()
    script = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1]
    used = set(re.findall(r"(?<= )--[\w-]+", script.partition("pretrain_gpt.py")[2]))
    assert len(used) > 40
    assert used <= set(flags)


def test_the_run_beside_their_script_is_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    config, _, _ = parse_config(["--config", str(path)])
    assert config.model.hidden_size == 2048
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.training.eval_samples == 10 * config.batch.global_batch_size


@pytest.mark.parametrize(
    ("keys", "verdict"),
    [
        pytest.param(CODE.findall(keys), verdict, id=keys[:40].replace(" ", "_"))
        for keys, verdict in zip(
            column("The DeepSpeed JSON", "key in their JSONs"),
            column("The DeepSpeed JSON", "here"),
            strict=True,
        )
    ],
)
def test_verdicts_on_json_keys_are_those_of_the_table(keys, verdict):
    for key in keys:
        accepted = ACCEPTED_KEYS
        for name in key.split("."):
            accepted = accepted.get(name) if isinstance(accepted, dict) else None
        if verdict == "refused":
            assert key in REFUSED_KEYS or accepted is None, key
        else:
            assert key not in REFUSED_KEYS and accepted is not None, key


def test_tags_are_written():
    rooms = (ROOT / "megagpt" / "monitor", ROOT / "megagpt" / "training")
    source = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    source = source.replace("{name}", "")
    tags = [tag for cell in column("TensorBoard", "ours") for tag in CODE.findall(cell)]
    assert len(tags) > 15
    for tag in tags:
        assert f'"{tag}"' in source, tag


def test_words_of_the_line_are_printed():
    source = (ROOT / "megagpt" / "monitor" / "metrics.py").read_text()
    for theirs, ours in zip(column("The line", "theirs"), column("The line", "ours"), strict=True):
        same = ours.startswith("the same word")
        for words in CODE.findall(theirs if same else ours):
            assert f" {words}: " in source, words


def test_paths_exist():
    rooms = ("docs/", "ds_configs/", "launch/", "megagpt/", "tests/")
    paths = [code for code in ours() if code.startswith(rooms)]
    assert len(paths) > 2
    for path in paths:
        assert (ROOT / path).exists(), path


def test_presets_exist():
    names = re.findall(r"--preset ([\w.-]+)", PAGE)
    assert names
    assert set(names) <= PRESETS.keys()


def test_verbs_exist():
    verbs = pytest.importorskip("megagpt.commands").VERBS
    named = set(re.findall(r"`megagpt (\w+)", PAGE))
    assert len(named) > 5
    assert named <= verbs.keys()


def test_links_to_headings_lead_somewhere():
    headings = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
