"""Each section refuses by itself what its settings cannot be; values after their defaults."""

from __future__ import annotations

import dataclasses

import pytest

from megagpt.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (ModelConfig, {"num_layers": 0}, "num_layers=0 must be above 0; give a positive number"),
        (ModelConfig, {"dropout": 1.0}, "dropout=1.0 must lie in [0, 1)"),
        (ModelConfig, {"hidden_size": 385}, "hidden_size=385 is not divisible by num_attention_h"),
        (ModelConfig, {"num_kv_heads": 4}, "num_attention_heads=6 is not divisible by num_kv_he"),
        (ModelConfig, {"hidden_size": 18, "position_embedding": "rope"}, "= 3 is odd; rotary"),
        (ParallelConfig, {"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be above 0"),
        (ParallelConfig, {"sequence_parallel": True}, "no effect at tensor_parallel_size=1"),
        (ParallelConfig, {"pipeline_partition": "flops"}, "no effect at pipeline_parallel_size=1"),
        (BatchConfig, {"micro_batch_size": -1}, "micro_batch_size=-1 must be above 0"),
        (OptimizerConfig, {"lr": 0.0}, "lr=0.0 must be above 0"),
        (OptimizerConfig, {"lr": float("inf")}, "lr=inf is not finite; give a number that is"),
        (OptimizerConfig, {"clip_grad": float("nan")}, "clip_grad=nan is not finite"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps=-1 is negative; give 0 or more"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "betas=[0.9, 1.0] must lie in [0, 1); change 1.0"),
        (OptimizerConfig, {"min_lr": 1.0}, "min_lr=1.0 is above lr=0.001"),
        (OptimizerConfig, {"wsd_decay_steps": 5}, "no effect under schedule=cosine"),
        (TrainingConfig, {"exit_step": 0}, "exit_step=0 must be above 0"),
        (TrainingConfig, {"eval_interval": -1}, "eval_interval=-1 is negative"),
        (DataConfig, {"path": "a", "test_path": "b"}, "exclude each other; name pairs to split"),
        (DataConfig, {"valid_path": "a"}, "need data.train_path; name the training pair too"),
        (DataConfig, {"path": []}, "data.path names no pair"),
        (DataConfig, {"train_path": ["a", "a"]}, "names a pair twice"),
        (DataConfig, {"path": {"a": 0.0}}, "gives a the weight 0.0; give each a positive number"),
        (CheckpointConfig, {"keep_last": -1}, "keep_last=-1 is negative"),
        (CheckpointConfig, {"keep_every": 5}, "no effect with keep_last=0"),
        (CheckpointConfig, {"override": ["data"]}, "no effect with load=none"),
        (MonitorConfig, {"log_interval": 0}, "log_interval=0 must be above 0"),
    ],
)
def test_a_section_refuses_a_wrong_value_in_one_line(section, settings, message):
    with pytest.raises(ValueError) as error:
        section(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_after_their_defaults():
    model = ModelConfig(hidden_size=384, num_attention_heads=6)
    assert (model.head_size, model.kv_heads, model.ffn_size) == (64, 6, 1536)
    assert dataclasses.replace(model, activation="swiglu").ffn_size == 1024
    assert dataclasses.replace(model, vocab_size=257).padded_vocab_size(2) == 512
    assert BatchConfig(micro_batch_size=2, global_batch_size=12).gradient_accumulation_steps(3) == 2
    assert (
        BatchConfig(micro_batch_size=2, global_batch_size=8).gradient_accumulation_steps(3) is None
    )
    wsd = Config(optimizer=OptimizerConfig(schedule="wsd"))
    assert (wsd.decay_steps, wsd.wsd_decay_steps) == (500, 50)
    assert Config(optimizer=OptimizerConfig(decay_steps=5)).wsd_decay_steps == 0
