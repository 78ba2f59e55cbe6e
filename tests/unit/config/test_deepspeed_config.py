"""Tests of the resolver: filled, kept, refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megagpt.config.command_line import parse_config
from megagpt.config.deepspeed_config import (
    ResolvedDeepSpeedConfig,
    format_resolved_table,
    resolve_ds_config,
)
from megagpt.config.deepspeed_json import read_ds_config
from megagpt.config.schema import BatchConfig, Config, ModelConfig, OptimizerConfig, TrainingConfig

DS_CONFIGS = sorted((Path(__file__).resolve().parents[3] / "ds_configs").glob("*.json"))
STAGE1 = {"zero_optimization": {"stage": 1}}


def config_with(precision: Any = "bf16", **optimizer: Any) -> Config:
    return Config(
        batch=BatchConfig(micro_batch_size=2, global_batch_size=16),
        training=TrainingConfig(precision=precision),
        optimizer=OptimizerConfig(**optimizer),
    )


def resolve(
    ds_config: dict[str, Any], config: Config | None = None, device: Any = "cpu"
) -> ResolvedDeepSpeedConfig:
    return resolve_ds_config(
        config or config_with(),
        ds_config,
        world_size=2,
        ds_config_path="ds.json",
        device=device,
    )


def refusal(ds_config: dict[str, Any], config: Config | None = None, device: Any = "cpu") -> str:
    with pytest.raises(ValueError) as error:
        resolve(ds_config, config, device)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_absent_and_auto_keys_are_filled_alike() -> None:
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "auto"},
        "communication_data_type": "auto",
        "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": "auto",
        **STAGE1,
    }
    expected = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        **STAGE1,
    }
    assert resolve(auto).values == expected
    resolved = resolve(STAGE1)
    assert resolved.values == expected
    assert resolved.sources["train_batch_size"] == "config"
    assert resolved.sources["gradient_accumulation_steps"] == "derived"
    assert resolved.sources["zero_optimization.stage"] == "ds_config"
    assert STAGE1 == {"zero_optimization": {"stage": 1}}, "the input is not modified"


def test_equal_values_are_kept_and_the_optimizer_is_dropped() -> None:
    stated = {
        "train_batch_size": 16.0,
        "gradient_clipping": 1,
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "adamw",
            "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 500, "warmup_num_steps": 0, "cos_min_ratio": 0.1},
        },
        **STAGE1,
    }
    resolved = resolve(stated, config_with(min_lr=1e-4))
    assert resolved.values["train_batch_size"] == 16
    assert isinstance(resolved.values["train_batch_size"], int)
    assert resolved.sources["gradient_clipping"] == "ds_config"
    assert not {"optimizer", "scheduler"} & set(resolved.values)


def test_all_conflicts_stand_in_one_line_with_path_flag_and_both_values() -> None:
    message = refusal(
        {
            "train_batch_size": 64,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": False},
            "fp16": {"enabled": True},
            "optimizer": {"type": "Lamb", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupLR"},
            "data_types": {"grad_accum_dtype": "bf16"},
            "zero_optimisation": {},
            "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu", "pin_mem": True}},
        }
    )
    for part in (
        "ds.json: ",
        "train_batch_size=64 conflicts with --batch.global_batch_size=16",
        "gradient_clipping=0.5 conflicts with --optimizer.clip_grad=1.0",
        "bf16.enabled=false conflicts with --training.precision=bf16",
        "fp16.enabled=true conflicts with --training.precision=bf16",
        'optimizer.type="Lamb"',
        "optimizer.params.lr=0.1 conflicts with --optimizer.lr=0.001",
        'scheduler.type="WarmupLR" conflicts with --optimizer.schedule cosine',
        'data_types.grad_accum_dtype="bf16" conflicts',
        "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?",
        "unknown key 'zero_optimization.offload_param.pin_mem'; did you mean 'zero_optimization.of",
        "offload_param.device=cpu needs stage 3",
    ):
        assert part in message


def test_batch_that_does_not_multiply_out_shows_the_product() -> None:
    batch = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
    }
    message = refusal({**batch, **STAGE1})
    assert (
        "train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 3 x data-parallel size 2 "
        "= 12 != 16" in message
    )
    odd = Config(batch=BatchConfig(micro_batch_size=3, global_batch_size=16))
    assert "global_batch_size=16 is not divisible by micro_batch_size=3 x" in refusal(STAGE1, odd)


@pytest.mark.parametrize(
    ("ds_config", "precision", "device", "message"),
    [
        ({}, "bf16", "cpu", "set stage 1, or precision fp32"),
        ({}, "fp16", "cuda", "precision=fp16 with zero_optimization.stage=0"),
        (STAGE1, "fp16", "cpu", "fp16 cannot be trained on cpu: most CPUs have no fp16"),
        ({"activation_checkpointing": {}}, "fp32", "cpu", "activation checkpointing is megagpt's"),
        ({"tensorboard": {"enabled": True}}, "fp32", "cpu", "monitoring is megagpt's"),
        ({"checkpoint": {}}, "fp32", "cpu", "checkpoints are megagpt's"),
        ({"amp": {}}, "fp32", "cpu", "amp is refused: DeepSpeed 0.19.8 has removed it"),
        ({"bfloat16": {"enabled": True}}, "fp32", "cpu", "write bf16"),
        ({"stage": 3}, "fp32", "cpu", "did you mean 'zero_optimization.stage'?"),
        ({"zero_optimization": {"stage": 4}}, "fp32", "cpu", "stage=4 is not allowed; give one of"),
        ({"zero_optimization": True}, "fp32", "cpu", "has the wrong type; give an object"),
        ({"zero_optimization": {"stage": "auto"}}, "fp32", "cpu", '"auto" cannot be filled in'),
        (
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": "auto"}},
            "fp32",
            "cpu",
            'zero_optimization.allgather_bucket_size="auto" cannot be filled in',
        ),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True}},
            "fp32",
            "cpu",
            'write zero_optimization.offload_optimizer: {"device": "cpu"}',
        ),
        (
            {"zero_optimization": {"stage": 1, "prefetch_bucket_size": 5}},
            "fp32",
            "cpu",
            "did you mean 'zero_optimization.stage3_prefetch_bucket_size'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}},
            "fp32",
            "cpu",
            "no effect under stage 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "fp32",
            "cpu",
            "needs stage 1, 2 or 3 and stage is 0",
        ),
        ({"gradient_clipping": "1"}, "fp32", "cpu", 'gradient_clipping="1" is not allowed; give a'),
        ({"communication_data_type": "bf16"}, "fp32", "cpu", "communication_data_type"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(
    ds_config: dict[str, Any], precision: str, device: str, message: str
) -> None:
    assert message in refusal(ds_config, config_with(precision), device)


def test_a_stage_that_is_none_gives_no_further_complaint() -> None:
    zero = {"stage": 7, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 1}
    assert refusal({"zero_optimization": zero}).count(";") == 1


def test_wsd_equals_no_scheduler_of_deepspeed() -> None:
    config = config_with(schedule="wsd")
    message = refusal({"scheduler": {"type": "WarmupDecayLR"}, **STAGE1}, config)
    assert 'scheduler.type="WarmupDecayLR" conflicts with --optimizer.schedule wsd' in message


def test_sizes_are_whole_numbers_by_the_formulae_of_hugging_face() -> None:
    sizes = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    )
    zero = {"stage": 3, **dict.fromkeys(sizes, "auto")}
    values = resolve({"zero_optimization": zero}).values["zero_optimization"]
    assert [values[s] for s in sizes] == [50_000_000, 50_000_000, 3840]
    wide = ModelConfig(hidden_size=12_288, num_attention_heads=96)
    config = dataclasses.replace(config_with(), model=wide)
    values = resolve({"zero_optimization": zero}, config).values["zero_optimization"]
    assert [values[s] for s in sizes] == [12_288**2, int(0.9 * 12_288**2), 122_880]
    assert all(type(values[s]) is int for s in sizes)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda p: p.stem)
def test_shipped_json_resolves_and_deepspeed_takes_it(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    precision = "fp32" if path.stem == "zero0" else "bf16"
    resolved = resolve_ds_config(
        config_with(precision),
        read_ds_config(str(path)),
        world_size=1,
        ds_config_path=str(path),
        device="cpu",
    )
    theirs = DeepSpeedConfig(resolved.values)
    assert theirs.zero_optimization_stage == (1 if path.stem == "pipeline" else int(path.stem[4]))
    assert theirs.bfloat16_config.enabled == (precision == "bf16")
    assert (theirs.train_batch_size, theirs.gradient_accumulation_steps) == (16, 8)
    optimizer, param = theirs.zero_config.offload_optimizer, theirs.zero_config.offload_param
    expected = {"zero2_offload": "cpu", "zero3_offload": "cpu", "zero3_nvme": "nvme"}
    assert (optimizer and optimizer.device) == expected.get(path.stem)
    assert (param and param.device) == (
        None if path.stem == "zero2_offload" else expected.get(path.stem)
    )
    for offload in (optimizer, param):
        # In the run folder, so that runs do not share it.
        assert path.stem != "zero3_nvme" or str(offload.nvme_path) == "runs/default/nvme"


def test_every_mode_has_its_json() -> None:
    assert {p.stem for p in DS_CONFIGS} >= {
        *("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
        *("zero3_nvme", "pipeline"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "{} gives the key 'a' twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "gives the key 'stage' twice"),
        ('{\n"a": 1,\n', "{} line 3 column 1 is not valid JSON"),
        ('{"a": ' * 100_000, "{} is not valid JSON: its brackets are nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "{} is not valid JSON: a whole number has more than 4,300"),
        ('{"a": 1e400}', "{} holds 1e400, which is too large"),
        ("[1]", "{} holds a list, not an object"),
    ],
)
def test_bad_json_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_ds_config(str(path))
    assert message.format(path) in str(error.value) and "\n" not in str(error.value)


def test_table_shows_every_key_with_its_source() -> None:
    config, ds_config, sources = parse_config(["--model.bias", "false"])
    filled = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=512))
    table = format_resolved_table(filled, sources, resolve(ds_config, config_with()))
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table.splitlines()}
    assert rows["model.bias"] == ["false", "flag --model.bias"]
    assert rows["model.vocab_size"] == ["512", "derived"]
    assert rows["output_dir"] == ['"runs/default"', "default"]
    assert rows["ds_config.zero_optimization.stage"] == ["1", "ds_config default"]
    assert rows["ds_config.data_types.grad_accum_dtype"] == ['"fp32"', "derived"]
    assert set(sources) - {"ds_config"} <= set(rows)
    columns = {line.index(line.split()[1], len(line.split()[0])) for line in table.splitlines()}
    assert len(columns) == 1, "values are aligned"
