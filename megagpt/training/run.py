"""What is decided of a run before its ranks meet, and all that a user can get wrong.

First what the configuration alone decides, for which no file of data is opened; then what data,
checkpoints and the run folder say. No process group exists yet.
Next file: `start.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megagpt.checkpoint.directory import complete_steps, newest_state
from megagpt.checkpoint.format.manifest import CheckpointState, Layout
from megagpt.checkpoint.same_run import refuse_other_run
from megagpt.config.deepspeed_config import (
    ResolvedDeepSpeedConfig,
    format_resolved_table,
    resolve_ds_config,
)
from megagpt.config.refusals import Device
from megagpt.config.schema import Config, DataConfig
from megagpt.data.datasets import Dataset, build_datasets, data_fingerprint, first_prefix
from megagpt.data.indexed.manifest import Manifest, read_manifest
from megagpt.operations.hardware import cpu_computes_bf16
from megagpt.operations.prebuild import async_io_problem
from megagpt.parallel.topology import ParallelTopology

logger = logging.getLogger("megagpt")


@dataclass(frozen=True)
class ResolvedRun:
    """What the configuration alone decides; no file is opened for it."""

    config: Config
    """As it was given; in a `Run`, with the vocabulary that the data names."""
    ds_config: ResolvedDeepSpeedConfig
    """What DeepSpeed is given."""
    sources: dict[str, str]
    """Where each value of config came from, by dotted key."""
    topology: ParallelTopology
    """The ranks along the parallel axes."""
    layout: Layout
    """The same and the ZeRO stage, as a checkpoint tells it."""
    device: Device
    """What the run trains on."""

    def table(self) -> str:
        """Every setting with its value and its source."""
        return format_resolved_table(self.config, self.sources, self.ds_config)


@dataclass(frozen=True)
class Run:
    """All that is decided of a run before its ranks meet."""

    resolved: ResolvedRun
    """What the configuration decides."""
    rank: int
    """Of this process."""
    start_time: float
    """`time.monotonic()` when it was prepared."""
    datasets: dict[str, Dataset]
    """By split."""
    end_of_document: int | None
    """The token that ends documents, where the data's manifest tells it."""
    load_path: Path | None
    """The checkpoint or run folder to resume from; None for a fresh run."""
    state: CheckpointState
    """Where it begins: at step 0, or as the checkpoint says that will be loaded."""
    warnings: tuple[str, ...]
    """What works, but badly."""

    @property
    def config(self) -> Config:
        """The typed configuration, complete."""
        return self.resolved.config

    @property
    def directory(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    def announce(self) -> None:
        """Logs the settings and what works badly."""
        logger.info(self.resolved.table())
        for warning in self.warnings:
            logger.info(f"warning: {warning}")


def resolve_run(
    config: Config,
    ds_config: dict,
    *,
    sources: dict[str, str],
    world_size: int,
    device: Device,
) -> ResolvedRun:
    """Decides what needs neither data nor a checkpoint nor this machine.

    Args:
        config: Typed configuration.
        ds_config: The DeepSpeed JSON as read.
        sources: Where each value of config and the JSON came from, see `parse_config`.
        world_size: Ranks.
        device: What the run trains on.

    Raises:
        ValueError: With all settings that do not fit.
    """
    resolved = resolve_ds_config(
        config,
        ds_config,
        world_size=world_size,
        ds_config_path=sources["ds_config"] if sources["ds_config"] != "default" else "",
        device=device,
    )
    degrees = {
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
    }
    zero = resolved.values.get("zero_optimization", {})
    layout = Layout(
        world_size,
        **degrees,
        zero_stage=zero.get("stage", 0),
        offload=zero.get("offload_optimizer", {}).get("device", "none"),
    )
    topology = ParallelTopology(world_size, **degrees)
    return ResolvedRun(config, resolved, sources, topology, layout, device)


def prepare_run(resolved: ResolvedRun, *, rank: int, is_first_of_host: bool = True) -> Run:
    """Checks everything else that can be found wrong without the other ranks.

    Args:
        resolved: What the configuration decides.
        rank: Of this process.
        is_first_of_host: Whether it looks at the run folder and what is to be resumed; the others
            of a host need not all do the same, and are told by `with_start_of_rank_0`.

    Raises:
        ValueError: For anything that a user can mend.
    """
    start_time = time.monotonic()
    config = resolved.config
    warnings = [*resolved.ds_config.warnings, *_machine_warnings(resolved)]
    prefix = first_prefix(config.data)
    if prefix is None:
        raise ValueError(
            "no data is named; give --data.path PREFIX of a .bin/.idx pair made by "
            "megagpt preprocess (the demo's data and its config: make demo, then "
            "--config launch/demo.yaml)"
        )
    manifest = read_manifest(prefix)  # the first pair's, which stands for all
    vocab_size = _vocab_size(config.model.vocab_size, manifest, prefix)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size)
    )
    train_samples = config.training.train_steps * config.batch.global_batch_size
    datasets = build_datasets(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=vocab_size,
        train_samples=train_samples,
    )
    state = fresh = CheckpointState(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        config=config,
        data_fingerprint=data_fingerprint(config.data, train_samples=train_samples),
        tokenizer_sha256=manifest.tokenizer_sha256 if manifest else None,
    )
    if manifest is None:
        _refuse_masking(config.data)
    warnings += _evaluation_warnings(config, datasets)
    load_path = None
    if is_first_of_host:
        load_path = _load_path(config)
        if load_path is not None:
            state, _ = continued(newest_state(load_path), fresh)
    run = Run(
        dataclasses.replace(resolved, config=config),
        rank=rank,
        start_time=start_time,
        datasets=datasets,
        end_of_document=manifest.eod if manifest else None,
        load_path=load_path,
        state=state,
        warnings=tuple(warnings),
    )
    if is_first_of_host:
        _require_writable(run.directory)
    return run


def with_start_of_rank_0(run: Run) -> Run:
    """The run from where rank 0 begins it, so that all begin at one step; a collective."""
    box = [(run.load_path, run.state)]
    # broadcast from rank 0 over the world
    dist.broadcast_object_list(box, src=0)
    load_path, state = box[0]
    return dataclasses.replace(run, load_path=load_path, state=state)


def continued(saved: CheckpointState, asked: CheckpointState) -> tuple[CheckpointState, list[str]]:
    """The state to go on from, and the differences that were overridden.

    Args:
        saved: Of a checkpoint.
        asked: Of this run, whose configuration and data count from here on.

    Raises:
        ValueError: If another run wrote the checkpoint.
    """
    overridden = refuse_other_run(
        saved,
        asked.config,
        data_fingerprint=asked.data_fingerprint,
        tokenizer_sha256=asked.tokenizer_sha256,
        override=asked.config.checkpoint.override or (),
    )
    state = dataclasses.replace(
        saved,
        config=asked.config,
        data_fingerprint=asked.data_fingerprint,
        tokenizer_sha256=asked.tokenizer_sha256,
    )
    return state, overridden


def _machine_warnings(resolved: ResolvedRun) -> list[str]:
    """What this machine does badly; raises ValueError for what it cannot do."""
    zero = resolved.ds_config.values.get("zero_optimization", {})
    if "nvme" in (resolved.layout.offload, zero.get("offload_param", {}).get("device")):
        if problem := async_io_problem():
            raise ValueError(problem)
    is_bf16 = resolved.config.training.precision == "bf16"
    if resolved.device == "cpu" and is_bf16 and not cpu_computes_bf16():
        return [
            "this CPU has no bf16 arithmetic, which makes --training.precision=bf16 many times "
            "slower than fp32; set --training.precision fp32"
        ]
    return []


def _evaluation_warnings(config: Config, datasets: dict[str, Dataset]) -> list[str]:
    """Tells of validations that take as many samples as half of the training between them."""
    batch, training = config.batch.global_batch_size, config.training
    limit = training.samples_of_evaluation(batch)
    count = sum(min(len(d), limit) for name, d in datasets.items() if name.startswith("valid"))
    between = (training.eval_interval or training.train_steps) * batch
    if 2 * count < between:
        return []
    return [
        f"each validation scores {count:,} samples, {count / between:.0%} of the {between:,} that "
        f"are trained between two; lower --training.eval_samples (now {limit:,}) or raise "
        "--training.eval_interval"
    ]


def _vocab_size(given: int | None, manifest: Manifest | None, prefix: str) -> int | None:
    """The data's, unless it is given; refuses one that the tokenizer overflows."""
    if manifest is None:
        if given is None and Path(f"{prefix}.idx").exists():
            raise ValueError(
                f"{prefix} has no manifest to take the vocabulary from; give --model.vocab_size"
            )
        return given
    if given is not None and given < manifest.vocab_size:
        raise ValueError(
            f"model.vocab_size={given} is smaller than the {manifest.vocab_size} of the "
            f"tokenizer of {prefix}; raise it or leave it out"
        )
    return given or manifest.vocab_size


def _refuse_masking(data: DataConfig) -> None:
    """Refuses what needs the token that ends documents, where no manifest tells it."""
    for name in ("document_masking", "eod_mask_loss"):
        if getattr(data, name):
            raise ValueError(
                f"data.{name}=true needs the token that ends documents, and {first_prefix(data)} "
                "has no manifest that tells it; preprocess the data with "
                "megagpt preprocess, or turn it off"
            )


def _load_path(config: Config) -> Path | None:
    """Where to resume from; a fresh run must not meet the checkpoints of another."""
    directory, load = Path(config.output_dir), config.checkpoint.load
    if load != "none":
        return directory if load == "auto" else Path(load)
    if complete_steps(directory / "checkpoints"):
        raise ValueError(
            f"output_dir={directory} already holds checkpoints, which a fresh run would "
            "overwrite; resume with --checkpoint.load auto, or name another --output_dir"
        )
    return None


_FOLDERS = ("checkpoints", "tensorboard", "nvme")
_FILES = (
    "resolved_config.yaml",
    "resolved_config.txt",
    "resolved_ds_config.json",
    "training_summary.json",
)


def _require_writable(directory: Path) -> None:
    """Refuses a run folder that the run would fail to write later, with its ranks together."""
    for names, is_wrong, kind in (
        (_FOLDERS, Path.is_file, "folder"),
        (_FILES, Path.is_dir, "file"),
    ):
        for path in (directory / name for name in names):
            if is_wrong(path):
                raise ValueError(
                    f"{path} is in the way of the run's {kind} of that name; move it away or "
                    "name another --output_dir"
                )
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
