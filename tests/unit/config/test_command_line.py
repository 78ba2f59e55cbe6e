"""Tests of the command line: precedence, sources, one-line errors, round trip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from megagpt.config.command_line import (
    UsageError,
    config_from_dict,
    config_to_dict,
    parse_config,
)
from megagpt.config.schema import Config, ModelConfig, OptimizerConfig

ROOT = Path(__file__).resolve().parents[3]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flag_overrides_file_overrides_preset_and_sources_say_so(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run.yaml", "model:\n  hidden_size: 1152\n  num_layers: 3\noutput_dir: r\n"
    )
    config, _, sources = parse_config(
        ["--model.num_layers", "5", "--config", run, "--preset=gpt2-124m"]
    )
    assert (config.model.num_layers, config.model.hidden_size) == (5, 1152)
    assert config.model.seq_length == 1024
    assert config.output_dir == "r"
    assert sources["model.num_layers"] == "flag --model.num_layers"
    assert sources["model.hidden_size"] == f"file {run}"
    assert sources["model.seq_length"] == "preset gpt2-124m"
    assert sources["batch.micro_batch_size"] == "default"


def test_later_file_wins_and_values_keep_their_types(tmp_path: Path) -> None:
    one = write(tmp_path / "1.yaml", "optimizer:\n  lr: 1e-3\n  betas: [0.9, 0.99]\nmodel:\n")
    two = write(tmp_path / "2.yaml", "optimizer:\n  lr: 1\n")
    config, _, sources = parse_config(
        ["--config", one, "--config", two, "--model.bias", "false", "--model.num_kv_heads=null"]
        + ["--output_dir", "123", "--local_rank=1", "--local-rank", "0"]
    )
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.model.bias is False and config.model.num_kv_heads is None
    assert config.output_dir == "123"
    assert sources["optimizer.betas"] == f"file {one}"


def test_ds_config_is_read_and_its_default_trains_in_bf16(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", '{"zero_optimization": {"stage": 3}}')
    _, ds_config, sources = parse_config(["--ds_config", path])
    assert ds_config == {"zero_optimization": {"stage": 3}} and sources["ds_config"] == path
    _, ds_config, sources = parse_config([])
    assert ds_config == {"zero_optimization": {"stage": 1}} and sources["ds_config"] == "default"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.hiden_size", "3"], "unknown flag '--model.hiden_size'; did you mean"),
        (["--hidden_size=3"], "did you mean '--model.hidden_size'?"),
        (["--deepspeed_config", "x.json"], "did you mean '--ds_config'?"),
        (
            ["--model.hidden_size", "abc"],
            "--model.hidden_size=abc has the wrong type; give a whole",
        ),
        (["--model.hidden_size", "6.5"], "give a whole number"),
        (["--training.precision", "bf17"], "give one of fp32, bf16, fp16"),
        (["--optimizer.lr", ".nan"], "give a finite number"),
        (["--optimizer.betas", "[0.9]"], "give 2 numbers"),
        (["--model.num_kv_heads", "x"], "give a whole number such as 8 or null"),
        (["--model.bias"], "--model.bias has no value"),
        (["--model.bias", "--model.qk_norm"], "--model.bias has no value"),
        (["run.yaml"], "unexpected argument 'run.yaml'"),
        (["--print_config=yes"], "--print_config takes no value"),
        (["--preset", "gpt5"], "unknown preset 'gpt5'; choose one of demo, gpt2-124m"),
    ],
)
def test_wrong_command_line_is_a_one_line_usage_error(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {hiden_size: 3}",
            "unknown key 'model.hiden_size' in {}; did you mean 'model.hidd",
        ),
        ("hidden_size: 3", "unknown key 'hidden_size' in {}; did you mean 'model.hidden_size'?"),
        ("modle: {hidden_size: 3}", "unknown section 'modle' in {}; did you mean 'model'?"),
        ("zzz: {a: 3}", "the sections are batch, checkpoint"),
        ("model: 3", "section 'model' in {} is 3"),
        ("model: {hidden_size: abc}", "model.hidden_size='abc' in {} has the wrong type; give a w"),
        ("model: {num_layers: true}", "give a whole number"),
        ("output_dir: {a: 1}", "give text"),
        ("optimizer: {lr: .inf}", "give a finite number"),
        ("- 1", "holds a list"),
        (
            "model:\n  num_layers: 3\n  num_layers: 4",
            "{} line 3 is not valid YAML: key 'num_layers'",
        ),
        ("model:\n  a: [1", "line 2 is not valid YAML"),
        ("model: {hidden_size: 770}", "hidden_size=770 is not divisible by num_attention_heads=6"),
    ],
)
def test_wrong_file_is_a_one_line_value_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError) as error:
        parse_config(["--config", path])
    assert message.format(path) in str(error.value) and "\n" not in str(error.value)
    assert not isinstance(error.value, UsageError)


def test_config_survives_yaml_and_bad_saved_values_are_refused() -> None:
    config = Config(
        model=ModelConfig(num_kv_heads=2, activation="swiglu"),
        optimizer=OptimizerConfig(betas=(0.8, 0.9), eps=1e-20),
        output_dir="a b",
    )
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config
    with pytest.raises(ValueError, match="unknown key 'model.layers' in the saved configuration"):
        config_from_dict({"model": {"layers": 3}})


def test_print_config_prints_yaml_that_gives_the_same_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--preset", "llama-1b", "--print_config"])
    assert stop.value.code == 0
    path = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert parse_config(["--config", path])[0] == parse_config(["--preset", "llama-1b"])[0]


def test_help_names_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--local_rank" not in text
    for words in ("--model.rope_theta", "Peak learning rate.", "--ds_config", "--output_dir"):
        assert words in text


def test_config_room_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, megagpt.config.command_line as c; c.parse_config([]); " + (
        "sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
