"""The run from configuration to summary: what is checked first, the loop, and what is written.

Reads top to bottom. Everything that a user can get wrong is checked before a process group exists.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from deepspeed import DeepSpeedEngine

from megagpt import __version__
from megagpt.checkpoint.directory import complete_steps, newest_readable
from megagpt.checkpoint.format.manifest import CheckpointState, Layout
from megagpt.checkpoint.loader import CheckpointRefused
from megagpt.checkpoint.same_run import refuse_other_run
from megagpt.checkpoint.saver import Checkpointer, SaveFailed
from megagpt.config.command_line import config_to_dict
from megagpt.config.deepspeed_config import format_resolved_table, resolve_ds_config
from megagpt.config.schema import Config
from megagpt.data.datasets import Dataset, build_datasets, data_fingerprint, first_prefix
from megagpt.data.indexed.manifest import read_manifest
from megagpt.files import write_json
from megagpt.model.build import build_model
from megagpt.model.gpt import count_parameters
from megagpt.monitor.memory import memory_metrics
from megagpt.monitor.metrics import MetricLogger
from megagpt.monitor.throughput import model_flops_per_token
from megagpt.operations.hardware import cpu_computes_bf16
from megagpt.operations.prebuild import async_io_problem
from megagpt.parallel.groups import ProcessGroups
from megagpt.parallel.topology import ParallelTopology
from megagpt.training.batches import Batches
from megagpt.training.engine import build_engine, parameter_norm
from megagpt.training.schedule import learning_rate
from megagpt.training.stopping import StopSignal, agree, is_finished
from megagpt.training.train_step import StepResult, evaluate, train_step

logger = logging.getLogger("megagpt")

_ABANDON_SECONDS = 120.0
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among the ranks, as the launcher's environment says."""

    rank: int
    size: int

    @classmethod
    def from_environment(cls) -> World:
        """Reads RANK and WORLD_SIZE; a plain `python` run is a world of one."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class Trainer:
    """One training run on this rank.

    Args:
        config: Typed configuration.
        ds_config: The DeepSpeed JSON as read.
        ds_config_path: Its name, for messages.
        sources: Where each value of config came from, by dotted key.
        world: This rank.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: For anything that a user can mend; no process group exists yet.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict,
        *,
        ds_config_path: str,
        sources: dict[str, str],
        world: World,
        device: Literal["cpu", "cuda"],
    ) -> None:
        self.start_time = time.monotonic()
        self.world = world
        self.device = device
        self.resolved = resolve_ds_config(
            config,
            ds_config,
            world_size=world.size,
            ds_config_path=ds_config_path,
            device=device,
        )
        self.topology = ParallelTopology(
            world.size,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        )
        zero = self.resolved.values.get("zero_optimization", {})
        self.layout = Layout(
            world_size=world.size,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            pipeline_parallel_size=config.parallel.pipeline_parallel_size,
            zero_stage=zero.get("stage", 0),
            offload=zero.get("offload_optimizer", {}).get("device", "none"),
        )
        if "nvme" in (self.layout.offload, zero.get("offload_param", {}).get("device")):
            if problem := async_io_problem():
                raise ValueError(problem)
        self.config = _with_vocab_size(config)
        train_samples = config.training.train_steps * config.batch.global_batch_size
        self.datasets: dict[str, Dataset] = build_datasets(
            self.config.data,
            seq_length=self.config.model.seq_length,
            seed=self.config.training.seed,
            vocab_size=self.config.model.vocab_size,
            train_samples=train_samples,
        )
        self.tokenizer_sha256 = _tokenizer_sha256(self.config)
        self.fingerprint = data_fingerprint(self.config.data, train_samples=train_samples)
        self.run_directory = Path(config.output_dir)
        self.checkpoints = self.run_directory / "checkpoints"
        _, dp_rank, _ = self.topology.coordinates(world.rank)
        self.batches = Batches(
            self.config,
            self.datasets,
            dp_rank=dp_rank,
            dp_size=self.topology.data_parallel_size,
        )
        self.load_path: Path | None = None
        self.overridden: list[str] = []
        self.is_interrupted = False  # by a signal to stop; the state is saved
        self.state = self._starting_point()
        self.table = format_resolved_table(self.config, sources, self.resolved)
        _require_writable(self.run_directory)

    def _starting_point(self) -> CheckpointState:
        """The state of a fresh run, or that of the checkpoint that will be loaded."""
        load = self.config.checkpoint.load
        if load == "none":
            if complete_steps(self.checkpoints):
                raise ValueError(
                    f"output_dir={self.run_directory} already holds checkpoints, which a "
                    f"fresh run would "
                    "overwrite; resume with --checkpoint.load auto, or name another --output_dir"
                )
            return CheckpointState(
                step=0,
                consumed_samples=0,
                consumed_tokens=0,
                config=self.config,
                data_fingerprint=self.fingerprint,
                tokenizer_sha256=self.tokenizer_sha256,
            )
        self.load_path = self.run_directory if load == "auto" else Path(load)
        return self._continued(newest_readable(self.load_path).state)

    def _continued(self, saved: CheckpointState) -> CheckpointState:
        """The state to go on from; refuses one that another run wrote."""
        self.overridden = refuse_other_run(
            saved,
            self.config,
            data_fingerprint=self.fingerprint,
            tokenizer_sha256=self.tokenizer_sha256,
            override=self.config.checkpoint.override or (),
        )
        return dataclasses.replace(
            saved,
            config=self.config,
            data_fingerprint=self.fingerprint,
            tokenizer_sha256=self.tokenizer_sha256,
        )

    def run(self, on_step: Callable[[StepResult], bool | None] | None = None) -> dict:
        """Trains to the end or to a stopping rule; needs an initialised process group.

        Args:
            on_step: Called after each step with its exact figures, on every rank; where all return
                True, the run ends there, with no evaluation and no checkpoint.

        Returns:
            The summary that is also written to `training_summary.json`; {} if on_step ended it.
        """
        config = self.config
        logger.info(self.table)
        warnings = list(self.resolved.warnings)
        if self.device == "cpu" and config.training.precision == "bf16" and not cpu_computes_bf16():
            warnings.append(
                "this CPU has no bf16 arithmetic, which makes --training.precision=bf16 many times "
                "slower than fp32; set --training.precision fp32"
            )
        for warning in warnings:
            logger.info(f"warning: {warning}")
        if is_finished(config.training, self.state):
            logger.info(
                f"nothing to do: step {self.state.step} of {config.training.train_steps} "
                f"is already trained in {self.run_directory}; raise its limit to go on"
            )
            return self._read_summary()
        if self.world.rank == 0:
            self._write_resolved()
        self.set_up()
        logger.info(
            f"parameters: {count_parameters(config.model):,} | tokens / micro-batch / rank: "
            f"{config.batch.micro_batch_size} x {config.model.seq_length} | tokens / step: "
            f"{config.batch.global_batch_size * config.model.seq_length:,} | ranks: "
            f"{self._layout_words()} | precision: {config.training.precision}"
        )
        with self._abandoning_on_error(), StopSignal() as stop_signal:
            metrics = MetricLogger(
                self.run_directory / "tensorboard",
                rank=self.world.rank,
                train_steps=config.training.train_steps,
                step=self.state.step,
                consumed_samples=self.state.consumed_samples,
            )
            metrics.text("resolved configuration", self.table)
            summary = self._train(metrics, stop_signal, on_step)
        metrics.close()
        self.checkpointer.close()
        self.batches.close()
        self._remove_swap_files()
        return summary

    def set_up(self) -> None:
        """Builds model, engine and checkpointer, and resumes where that is asked for."""
        config = self.config
        assert config.model.vocab_size is not None  # from the data's manifest
        self.groups = ProcessGroups(self.topology)
        model = build_model(
            config.model,
            seed=config.training.seed,
            dtype=_DTYPES[config.training.precision],
            ds_config=self.resolved.values,
            parallel=config.parallel,
            groups=self.groups,
            recompute=config.training.activation_checkpointing,
            has_position_ids=config.data.document_masking,
        )
        self.engine = build_engine(model, config.optimizer, self.resolved.values, self.groups)
        self.checkpointer = Checkpointer(
            self.checkpoints,
            self.engine,
            self.groups,
            layout=self.layout,
            vocab_size=config.model.vocab_size,
            config=config.checkpoint,
        )
        if self.load_path is not None:
            with self._abandoning_on_error():
                self._resume()

    @contextmanager
    def _abandoning_on_error(self) -> Iterator[None]:
        """Gives up the checkpoints; the last save may still be on its way to the disk."""
        try:
            yield
        except BaseException:
            self.checkpointer.abandon(_ABANDON_SECONDS)
            raise

    def _train(
        self,
        metrics: MetricLogger,
        stop_signal: StopSignal,
        on_step: Callable[[StepResult], bool | None] | None,
    ) -> dict:
        """Steps, validations and saves until a stopping rule or a signal; the summary."""
        config, engine = self.config, self.engine
        validation: dict[str, float] = {}
        trained_tokens, train_seconds = 0, 0.0
        skipped, nan = self.state.step - self.state.adam_step, 0
        while True:
            result, lr, seconds = self.advance()
            if on_step is not None and on_step(result):
                return {}
            trained_tokens += result.num_tokens
            train_seconds += seconds
            skipped += not engine.was_step_applied()
            nan += not np.isfinite(result.loss)
            step = self.state.step
            if step % config.monitor.log_interval == 0:
                values = self._step_metrics(engine, result, lr, seconds)
                values |= {"skipped-iterations": skipped, "nan-iterations": nan}
                metrics.training(step, self.state.consumed_samples, values)
            verdict = agree(
                config.training,
                self.state,
                start_time=self.start_time,
                signalled=stop_signal.received is not None,
                has_save_failed=self.checkpointer.has_failed,
            )
            if verdict.has_save_failed:
                self._finish_save()
            stop, self.is_interrupted = verdict.stop, verdict.is_signalled
            # Told to stop, there may be little time: save, and evaluate another day.
            if self._is_due(config.training.eval_interval, stop) and not self.is_interrupted:
                validation = self._validate(engine, metrics)
            summary = {}
            if stop and not self.is_interrupted:
                summary = self._summary(
                    result, validation, tokens_per_second=trained_tokens / train_seconds
                )
            if self._is_due(config.checkpoint.save_interval, stop):
                self._save(is_last=stop is not None)
            if stop:
                logger.info(f"stopping at step {step}: {stop}")
                return summary

    def _summary(
        self, result: StepResult, validation: dict[str, float], *, tokens_per_second: float
    ) -> dict:
        """The figures of the run, also written; before the last checkpoint, which marks its end."""
        summary = {
            "megagpt_version": __version__,
            "num_parameters": count_parameters(self.config.model),
            "step": self.state.step,
            "tokens": self.state.consumed_tokens,
            "tokens_per_second": tokens_per_second,
            "train_loss": result.loss,
            "validation_loss": validation.get("valid"),
            **{
                f"validation_loss-{split.removeprefix('valid-')}": loss
                for split, loss in validation.items()
                if split != "valid"
            },
            "seconds": time.monotonic() - self.start_time,
        }
        if self.world.rank == 0:
            write_json(self.run_directory / "training_summary.json", summary)
        return summary

    def _resume(self) -> None:
        """Loads the checkpoint; if it is damaged, the one before it in the same folder."""
        assert self.load_path is not None
        saved, directory = self.checkpointer.load(self.load_path)
        try:
            self.state = self._continued(saved)
        except ValueError as error:  # of an older checkpoint than the one that was checked first
            raise CheckpointRefused(str(error)) from None
        for difference in self.overridden:
            logger.info(f"overridden: {difference}")
        logger.info(f"resumed from {directory} at step {self.state.step}")

    def _save(self, *, is_last: bool) -> None:
        """Saves the state; the last time it waits until it is on disk."""
        step = self.state.step
        self._finish_save()  # the one before, in the background
        logger.info(f"saving checkpoint at iteration {step:7d} to {self.checkpoints}")
        try:
            self.checkpointer.save(self.state)
            if is_last:
                self.checkpointer.finish()
        except SaveFailed as error:
            self._save_failed(error, is_last=is_last)
            return
        if is_last or not self.config.checkpoint.async_save:
            logger.info(f"  successfully saved checkpoint at iteration {step:7d}")

    def _finish_save(self) -> None:
        try:
            self.checkpointer.finish()
        except SaveFailed as error:
            self._save_failed(error, is_last=False)

    def _save_failed(self, error: SaveFailed, *, is_last: bool) -> None:
        if is_last or error.is_final or self.config.checkpoint.on_save_error == "stop":
            raise error
        logger.info(f"warning: {error}; training goes on (checkpoint.on_save_error=continue)")

    def _remove_swap_files(self) -> None:
        """Removes what NVMe offload left in the run folder; a path of the user's stays as it is."""
        dist.barrier()
        for key, source in self.resolved.sources.items():
            if key.endswith(".nvme_path") and source == "derived":
                shutil.rmtree(self.run_directory / "nvme", ignore_errors=True)

    def advance(self) -> tuple[StepResult, float, float]:
        """Takes one optimizer step; returns its figures, its learning rate and its seconds."""
        config = self.config
        begin = time.monotonic()
        lr = learning_rate(
            self.state.step + 1,
            config.optimizer,
            decay_steps=config.decay_steps,
            wsd_decay_steps=config.wsd_decay_steps,
        )
        result = train_step(
            self.engine,
            self.batches.training(self.state.consumed_samples, step=self.state.step + 1),
            groups=self.groups,
            lr=lr,
        )
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            consumed_samples=self.state.consumed_samples + config.batch.global_batch_size,
            consumed_tokens=self.state.consumed_tokens + result.num_tokens,
            learning_rate=lr,
        )
        return result, lr, time.monotonic() - begin

    def _validate(self, engine: DeepSpeedEngine, metrics: MetricLogger) -> dict[str, float]:
        """Loss of each validation set: valid, and valid-NAME."""
        losses = {}
        for split in self.datasets:
            if split.startswith("valid"):
                losses[split] = evaluate(engine, self.batches.evaluation(split), groups=self.groups)
                metrics.validation(
                    self.state.step,
                    self.state.consumed_samples,
                    losses[split],
                    name=split.removeprefix("valid"),
                )
        return losses

    def _is_due(self, interval: int, stop: str | None) -> bool:
        """Whether to act after this step: at each interval (0 is never), and at the end."""
        return stop is not None or (interval > 0 and self.state.step % interval == 0)

    def _layout_words(self) -> str:
        topology, parallel = self.topology, self.config.parallel
        sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
        return (
            f"{self.world.size} (data {topology.data_parallel_size} x tensor "
            f"{topology.tensor_parallel_size}{sequence} x pipeline "
            f"{topology.pipeline_parallel_size}) | ZeRO stage: {self.layout.zero_stage}"
        )

    def _step_metrics(
        self, engine: DeepSpeedEngine, result: StepResult, lr: float, seconds: float
    ) -> dict[str, float]:
        config = self.config
        flops = model_flops_per_token(config.model) * result.num_tokens
        tflops = flops / seconds / self.world.size / 1e12
        values = {
            "lm loss": result.loss,
            "learning-rate": lr,
            "grad-norm": result.grad_norm,
            "params-norm": parameter_norm(engine, self.groups),
            "batch-size": float(config.batch.global_batch_size),
            "loss-scale": float(engine.optimizer.loss_scale)
            if config.training.precision == "fp16"
            else 1.0,
            "world-size": float(self.world.size),
            "iteration-time": seconds,
            "data-wait-share": self.batches.wait_seconds / seconds,
            "throughput": tflops,
            "tokens-per-second": result.num_tokens / seconds,
            **memory_metrics(),
        }
        if config.monitor.peak_tflops is not None:
            values["mfu"] = tflops / config.monitor.peak_tflops
        return values

    def _write_resolved(self) -> None:
        directory = self.run_directory
        (directory / "resolved_config.yaml").write_text(
            yaml.safe_dump(config_to_dict(self.config), sort_keys=False)
        )
        (directory / "resolved_config.txt").write_text(self.table + "\n")
        (directory / "resolved_ds_config.json").write_text(
            json.dumps(self.resolved.values, indent=1) + "\n"
        )

    def _read_summary(self) -> dict:
        path = self.run_directory / "training_summary.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def _with_vocab_size(config: Config) -> Config:
    """Takes vocab_size from the data's manifest; refuses one that the tokenizer overflows."""
    prefix = first_prefix(config.data)
    if prefix is None:
        raise ValueError(
            "no data is named; give --data.path PREFIX of a .bin/.idx pair made by "
            "megagpt preprocess (the demo's data and its config: make demo, then "
            "--config launch/demo.yaml)"
        )
    manifest = read_manifest(prefix)
    given = config.model.vocab_size
    if manifest is None:
        if given is None and Path(f"{prefix}.idx").exists():
            raise ValueError(
                f"{prefix} has no manifest to take the vocabulary from; give --model.vocab_size"
            )
        return config
    if given is None:
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, vocab_size=manifest.vocab_size)
        )
    if given < manifest.vocab_size:
        raise ValueError(
            f"model.vocab_size={given} is smaller than the {manifest.vocab_size} of the "
            f"tokenizer of "
            f"{prefix}; raise it or leave it out"
        )
    return config


def _tokenizer_sha256(config: Config) -> str | None:
    """Hash of the tokenizer that the data's manifest names."""
    prefix = first_prefix(config.data)
    manifest = read_manifest(prefix) if prefix else None
    return manifest.tokenizer_sha256 if manifest else None


def _require_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # a rank of another host may have had the same name
    except OSError as error:
        raise ValueError(
            f"output_dir={directory} cannot be written ({error.strerror}); name a writable folder "
            "with --output_dir"
        ) from None
