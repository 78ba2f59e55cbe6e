"""Each rule of the table: an example that it refuses, in one line, before anything starts."""

import dataclasses
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from megagpt.config.command_line import config_from_dict, config_to_dict, parse_config
from megagpt.config.deepspeed_config import resolve_ds_config
from megagpt.config.refusals import RULES, Facts, find_problems, refuse_settings, rules_table
from megagpt.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)

ROOT = Path(__file__).resolve().parents[3]


def facts(
    world_size=8,
    device="cpu",
    precision="fp32",
    zero=None,
    micro=1,
    json=(),
    checkpoint=None,
    optimizer=None,
    seed=0,
    order="epoch",
    **settings,
):
    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    parallel = {k: v for k, v in settings.items() if k in ParallelConfig.__dataclass_fields__}
    config = Config(
        model=ModelConfig(**{"num_attention_heads": 8, "hidden_size": 64, **model}),
        parallel=ParallelConfig(**parallel),
        batch=BatchConfig(micro_batch_size=micro, global_batch_size=32),
        optimizer=optimizer or OptimizerConfig(),
        training=TrainingConfig(precision=precision, seed=seed),
        data=DataConfig(order=order),
        checkpoint=checkpoint or CheckpointConfig(),
    )
    values = {"zero_optimization": zero or {"stage": 1}, **dict(json)}
    return Facts(config, values, world_size, device)


WSD = {"schedule": "wsd", "decay_steps": 100}
OF_SETTINGS = {
    "warmup_steps that reach": (
        facts(optimizer=OptimizerConfig(warmup_steps=500)),
        ["warmup_steps=500", "decay_steps=500", "shorter warm-up"],
    ),
    "wsd_decay_steps longer": (
        facts(optimizer=OptimizerConfig(warmup_steps=50, wsd_decay_steps=51, **WSD)),
        ["wsd_decay_steps=51", "warmup_steps=50", "decay_steps=100", "choose fewer"],
    ),
    "a seed of more than 32 bits": (
        facts(seed=2**32, order="megatron"),
        ["seed=4294967296 with data.order=megatron", "choose a seed below"],
    ),
}
TP, PP = "tensor_parallel_size", "pipeline_parallel_size"
EXAMPLES = {
    **OF_SETTINGS,
    "ranks not a multiple": (facts(6, **{TP: 4}), ["6", "4 x", "multiple"]),
    "global_batch_size not": (
        facts(micro=3),
        ["global_batch_size=32", "micro_batch_size=3 x data-parallel size 8 = 24", "multiple"],
    ),
    "num_attention_heads": (
        facts(num_attention_heads=4, num_kv_heads=1, **{TP: 8}),
        ["num_attention_heads=4", "tensor_parallel_size=8"],
    ),
    "num_kv_heads": (
        facts(24, hidden_size=96, num_attention_heads=24, num_kv_heads=4, **{TP: 6}),
        ["num_kv_heads=4", "neither divides"],
    ),
    "width of the MLP": (facts(ffn_hidden_size=100, **{TP: 8}), ["ffn_hidden_size=100"]),
    "sequence_parallel": (
        facts(seq_length=60, sequence_parallel=True, **{TP: 8}),
        ["seq_length=60", "turn sequence_parallel off"],
    ),
    "above num_layers": (facts(num_layers=2, **{PP: 4}), ["=4", "num_layers=2"]),
    "stage 2 or 3": (facts(zero={"stage": 2}, **{PP: 2}), ["stage=2", "set stage 1"]),
    "overlap_comm": (
        facts(zero={"stage": 1, "overlap_comm": True}, **{PP: 2}),
        ["overlap_comm=true"],
    ),
    "wall_clock_breakdown": (
        facts(json={"wall_clock_breakdown": True}, **{PP: 2}),
        ["wall_clock_breakdown=true", "steps_per_print"],
    ),
    "fewer micro-batches": (facts(micro=8, **{PP: 4}), ["2 micro-batches", "global_batch_size"]),
    "bf16 or fp16": (facts(precision="bf16", zero={"stage": 0}), ["bf16", "set stage 1"]),
    "fp16 on the CPU": (facts(precision="fp16"), ["fp16 cannot be trained on cpu"]),
    "offload_param without": (
        facts(zero={"stage": 2, "offload_param": {"device": "cpu"}}),
        ["needs stage 3 and stage is 2"],
    ),
    "offload_optimizer with": (
        facts(zero={"stage": 0, "offload_optimizer": {"device": "cpu"}}),
        ["stage is 0"],
    ),
    "to nvme": (
        facts(zero={"stage": 2, "offload_optimizer": {"device": "nvme"}}),
        ["nvme", "device cpu"],
    ),
    "async_save": (
        facts(
            zero={"stage": 3, "offload_optimizer": {"device": "nvme"}},
            checkpoint=CheckpointConfig(async_save=True),
        ),
        ["async_save=true", "device=nvme"],
    ),
    "stage-3 keys": (
        facts(zero={"stage": 2, "stage3_max_live_parameters": 1}),
        ["stage3_max_live_parameters", "under stage 2"],
    ),
    "zero_hpz_partition_size with tensor": (
        facts(zero={"stage": 3, "zero_hpz_partition_size": 2}, **{TP: 2}),
        ["zero_hpz_partition_size=2", "tensor_parallel_size=2"],
    ),
    "zero_hpz_partition_size that does not divide": (
        facts(zero={"stage": 3, "zero_hpz_partition_size": 3}),
        ["zero_hpz_partition_size=3 on 8 ranks"],
    ),
    "divided before they are reduced": (
        facts(zero={"stage": 2}, json={"gradient_predivide_factor": 2.0}),
        ["gradient_predivide_factor", "stage 2"],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_found_by_its_rule_and_by_no_other(name):
    example, words = EXAMPLES[name]
    (rule,) = [rule for rule in RULES if name in rule.combination]
    refusals, warnings = find_problems(example)
    assert [bool(refusals), bool(warnings)] == [not rule.is_warning, rule.is_warning]
    (message,) = refusals + warnings
    assert rule.remedy in message and "\n" not in message
    for word in words:
        assert word in message, message


def test_every_rule_has_an_example_and_a_run_without_fault_has_none():
    assert len(EXAMPLES) == len(RULES)
    assert find_problems(facts(**{TP: 2, PP: 2, "num_kv_heads": 2})) == ([], [])


@pytest.mark.parametrize("name", OF_SETTINGS)
def test_settings_that_exclude_each_other_are_refused_when_they_are_read(name, tmp_path):
    example, words = OF_SETTINGS[name]
    values = config_to_dict(example.config)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({k: values[k] for k in ("optimizer", "training", "data")}))
    for read in (
        lambda: refuse_settings(example.config),
        lambda: parse_config(["--config", str(path), "--ds_config", "is not opened.json"]),
        lambda: config_from_dict(values),
    ):
        with pytest.raises(ValueError) as error:
            read()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_longest_warm_up_and_final_decay_that_fit_are_taken():
    for settings in ({"warmup_steps": 99, "decay_steps": 100}, {"warmup_steps": 90, **WSD}):
        refuse_settings(facts(optimizer=OptimizerConfig(**settings)).config)


def test_all_faults_stand_in_one_error_and_warnings_come_with_the_result():
    example = facts(num_layers=2, zero={"stage": 2}, **{PP: 4})
    with pytest.raises(ValueError) as error:
        resolve(example)
    assert "above num_layers" in str(error.value) and "stage=2 is not" in str(error.value)
    resolved = resolve(facts(micro=8, **{PP: 4}))
    assert len(resolved.warnings) == 1 and "micro-batches" in resolved.warnings[0]


def resolve(example):
    return resolve_ds_config(
        dataclasses.replace(example.config),
        example.ds_config,
        world_size=example.world_size,
        ds_config_path="ds.json",
        device=example.device,
    )


def test_the_page_of_layouts_holds_the_table():
    assert rules_table() in (ROOT / "docs/layouts.md").read_text()
