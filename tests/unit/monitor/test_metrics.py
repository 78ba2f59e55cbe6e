"""Scalars come back from the event file under Megatron's tags; only rank 0 writes."""

import logging
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.config.presets import PRESETS
from megagpt.monitor.metrics import MetricLogger
from megagpt.monitor.throughput import model_flops

VALUES = {
    "lm loss": 2.5,
    "learning-rate": 1e-3,
    "grad-norm": 0.75,
    "params-norm": 12.0,
    "batch-size": 16.0,
    "loss-scale": 1.0,
    "iteration-time": 0.5,
    "throughput": 0.2,
    "tokens-per-second": 8192.0,
    "skipped-iterations": 0,
    "nan-iterations": 0,
}


def read(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def test_scalars_stand_under_megatrons_tags_by_step_and_by_samples(tmp_path, caplog):
    metrics = MetricLogger(tmp_path, rank=0, train_steps=100, step=0, consumed_samples=0)
    with caplog.at_level(logging.INFO, logger="megagpt"):
        metrics.training(3, 48, VALUES)
        metrics.validation(3, 48, 2.0)
    metrics.text("resolved configuration", "a b")
    metrics.close()
    events, samples = read(tmp_path), read(tmp_path / "samples")
    for tag, value in VALUES.items():
        assert [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] == [(3, round(value, 5))]
        assert [e.step for e in samples.Scalars(f"{tag} vs samples")] == [48]
    assert events.Scalars("lm loss validation")[0].value == 2.0
    assert math.isclose(
        events.Scalars("lm loss validation ppl")[0].value, math.exp(2.0), rel_tol=1e-6
    )
    line = caplog.messages[0]
    assert "iteration        3/     100 | consumed samples:           48 |" in line
    assert "lm loss: 2.500000E+00 | loss scale: 1.0 | grad norm: 0.750 |" in line
    assert " validation loss at iteration 3 | lm loss value: 2.000000E+00" in caplog.messages[2]


def test_a_resumed_run_hides_points_after_the_resumed_step(tmp_path):
    first = MetricLogger(tmp_path, rank=0, train_steps=10, step=0, consumed_samples=0)
    for step in (1, 2, 3):
        first.training(step, 16 * step, VALUES)
    first.close()
    second = MetricLogger(tmp_path, rank=0, train_steps=10, step=2, consumed_samples=32)
    second.training(3, 48, VALUES | {"lm loss": 9.0})
    second.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("lm loss")] == [
        (1, 2.5),
        (2, 2.5),
        (3, 9.0),
    ]
    by_samples = read(tmp_path / "samples").Scalars("lm loss vs samples")
    assert [(e.step, e.value) for e in by_samples] == [(16, 2.5), (32, 2.5), (48, 9.0)]


def test_other_ranks_write_nothing(tmp_path, caplog):
    metrics = MetricLogger(tmp_path / "tb", rank=1, train_steps=1, step=0, consumed_samples=0)
    with caplog.at_level(logging.INFO, logger="megagpt"):
        metrics.training(1, 1, VALUES)
        metrics.validation(1, 1, 2.0)
    metrics.close()
    assert not (tmp_path / "tb").exists() and not caplog.messages


def test_flops_per_token_match_the_published_formula():
    # Narayanan et al. 2021 without recomputation: 72 B L s h^2 (1 + s/6h + V/12Lh) per batch
    import dataclasses

    config = dataclasses.replace(PRESETS["gpt3-175b"], vocab_size=51200)
    h, num_layers, s, v = config.hidden_size, config.num_layers, config.seq_length, 51200
    published = 72 * num_layers * h * h * (1 + s / (6 * h) + v / (12 * num_layers * h))
    whole = model_flops(config, num_tokens=s, num_pairs=s * s)  # of one sample
    assert math.isclose(whole, s * published, rel_tol=1e-12)
    # megatron.training counts s / 2 keys a query, and leaves the diagonal's half out.
    causal = model_flops(config, num_tokens=s, num_pairs=s * (s + 1) // 2)
    theirs = published - 72 * num_layers * h * h * s / (12 * h)
    assert math.isclose(causal, s * theirs, rel_tol=1e-4)
