"""Each rule of the table: an example that it refuses, in one line, before anything starts."""

import dataclasses
from pathlib import Path

import pytest

from megagpt.config.deepspeed_config import resolve_ds_config
from megagpt.config.refusals import RULES, Facts, find_problems, rules_table
from megagpt.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ModelConfig,
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
    **settings,
):
    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    parallel = {k: v for k, v in settings.items() if k in ParallelConfig.__dataclass_fields__}
    config = Config(
        model=ModelConfig(**{"num_attention_heads": 8, "hidden_size": 64, **model}),
        parallel=ParallelConfig(**parallel),
        batch=BatchConfig(micro_batch_size=micro, global_batch_size=32),
        training=TrainingConfig(precision=precision),
        checkpoint=checkpoint or CheckpointConfig(),
    )
    values = {"zero_optimization": zero or {"stage": 1}, **dict(json)}
    return Facts(config, values, world_size, device)


TP, PP = "tensor_parallel_size", "pipeline_parallel_size"
EXAMPLES = {
    "ranks not a multiple": (facts(6, **{TP: 4}), ["6", "4 x", "multiple"]),
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
    "ZeRO++": (
        facts(zero={"stage": 3, "zero_hpz_partition_size": 2}, **{TP: 2}),
        ["zero_hpz_partition_size"],
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
