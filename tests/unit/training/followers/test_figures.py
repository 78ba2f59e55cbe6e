"""The figures of the steps that are due; every step is counted."""

from types import SimpleNamespace

import pytest
import torch
from steps import record

from megagpt.config.schema import ModelConfig, MonitorConfig
from megagpt.monitor.throughput import model_flops
from megagpt.training.followers import figures
from megagpt.training.followers.figures import Figures
from megagpt.training.train_step import StepResult

MODEL = ModelConfig(vocab_size=257)


def follow(monkeypatch, config, records, *, loss_scale=None):
    """What is logged: (step, samples, values) of each step that is due."""
    monkeypatch.setattr(figures, "parameter_norm", lambda engine, groups: 12.0)
    logged = []
    metrics = SimpleNamespace(training=lambda *arguments: logged.append(arguments))
    engine = SimpleNamespace(
        device=torch.device("cpu"),
        fp16_enabled=lambda: loss_scale is not None,
        optimizer=SimpleNamespace(loss_scale=loss_scale),
    )
    session = SimpleNamespace(
        engine=engine,
        groups=SimpleNamespace(topology=SimpleNamespace(world_size=2)),
        batches=SimpleNamespace(sampler=SimpleNamespace(global_batch_size=4)),
    )
    follower = Figures(session, metrics, config, MODEL, num_skipped=3)
    for each in records:
        assert follower.after_step(each) is None
    return logged


def test_every_interval_is_logged_with_what_the_steps_between_gave(monkeypatch):
    steps = [record(1, was_applied=False), record(2, loss=float("nan")), record(3), record(4)]
    first, second = follow(
        monkeypatch, MonitorConfig(log_interval=2, params_norm_interval=4), steps
    )
    assert [first[:2], second[:2]] == [(2, 8), (4, 16)]
    assert "params-norm" not in first[2]
    values = second[2]
    assert values["skipped-iterations"] == 4 and values["nan-iterations"] == 1
    expected = {
        "lm loss": 2.0,
        "learning-rate": 1e-3,
        "grad-norm": 0.5,
        "params-norm": 12.0,
        "batch-size": 4.0,
        "loss-scale": 1.0,
        "world-size": 2.0,
        "iteration-time": 2.0,
        "data-wait-share": 0.25,
        "tokens-per-second": 5.0,
    }
    assert values.items() >= expected.items()
    assert not [tag for tag in values if tag.startswith("mfu")]


def test_utilisation_and_loss_scale_are_logged_where_there_are_any(monkeypatch):
    config = MonitorConfig(peak_tflops=1e-6)
    # Four samples of two documents each, half of the sequence long.
    half = MODEL.seq_length // 2
    causal, squares = 8 * half * (half + 1) // 2, 8 * half**2
    result = StepResult(loss=2.0, num_tokens=10, grad_norm=0.5, num_pairs=causal)
    ((_, _, values),) = follow(monkeypatch, config, [record(result=result)], loss_scale=64)
    for convention, num_pairs in (("", causal), ("-full-attention", squares)):
        flops = model_flops(MODEL, num_tokens=10, num_pairs=num_pairs)
        tflops = flops / 2.0 / 2 / 1e12
        assert values[f"throughput{convention}"] == pytest.approx(tflops)
        assert values[f"mfu{convention}"] == pytest.approx(tflops / 1e-6)
    assert values["loss-scale"] == 64.0
