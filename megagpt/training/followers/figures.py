"""The figures of a step: TensorBoard's scalars and Megatron's line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagpt.config.schema import ModelConfig, MonitorConfig
from megagpt.monitor.memory import memory_metrics
from megagpt.monitor.metrics import MetricLogger
from megagpt.monitor.throughput import model_flops, square_pairs
from megagpt.training.engine import parameter_norm
from megagpt.training.followers.record import StepRecord
from megagpt.training.start import Session


@dataclass
class Figures:
    """Writes the figures of every log_interval-th step; a collective then."""

    session: Session
    metrics: MetricLogger
    config: MonitorConfig
    model: ModelConfig
    num_skipped: int
    """Steps that were skipped, at first those before this process's first one."""
    num_nan: int = 0
    """Steps of this process whose loss was not finite."""

    def after_step(self, record: StepRecord) -> None:
        """Counts every step, writes those that are due."""
        self.num_skipped += not record.was_applied
        self.num_nan += not np.isfinite(record.result.loss)
        state = record.state
        if state.step % self.config.log_interval == 0:
            self.metrics.training(state.step, state.consumed_samples, self._values(record))

    def _values(self, record: StepRecord) -> dict[str, float]:
        result, seconds = record.result, record.seconds
        engine, groups = self.session.engine, self.session.groups
        world_size = groups.topology.world_size
        num_positions = self.session.batches.sampler.global_batch_size * self.model.seq_length
        tflops, tflops_full = (
            model_flops(self.model, num_tokens=result.num_tokens, num_pairs=num_pairs)
            / (seconds * world_size * 1e12)
            for num_pairs in (result.num_pairs, square_pairs(result.num_pairs, num_positions))
        )
        values = {
            "lm loss": result.loss,
            "learning-rate": record.state.learning_rate,
            "grad-norm": result.grad_norm,
            "batch-size": float(self.session.batches.sampler.global_batch_size),
            "loss-scale": float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0,
            "world-size": float(world_size),
            "iteration-time": seconds,
            "data-wait-share": record.data_wait_seconds / seconds,
            "throughput": tflops,
            "throughput-full-attention": tflops_full,
            "tokens-per-second": result.num_tokens / seconds,
            **memory_metrics(engine.device),
        }
        if self.config.params_norm_interval and not (
            record.state.step % self.config.params_norm_interval
        ):
            values["params-norm"] = parameter_norm(engine, groups)
        if self.config.peak_tflops is not None:
            values["mfu"] = tflops / self.config.peak_tflops
            values["mfu-full-attention"] = tflops_full / self.config.peak_tflops
        return values | {"skipped-iterations": self.num_skipped, "nan-iterations": self.num_nan}
