"""From a prepared run to one that can take steps: groups, model, engine, checkpointer, resume.

Needs an initialised process group. Next file: `loop.py`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import yaml
from deepspeed import DeepSpeedEngine

from megagpt.checkpoint.agreement import Agreement
from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.checkpoint.loader import CheckpointRefused
from megagpt.checkpoint.saver import Checkpointer
from megagpt.config.command_line import config_to_dict
from megagpt.data.samples.sampler import BatchSampler
from megagpt.kernels.registry import Kernels
from megagpt.model.build import build_model
from megagpt.model.gpt import count_parameters
from megagpt.operations.hardware import device_name
from megagpt.parallel.groups import ProcessGroups
from megagpt.training.batches import Batches
from megagpt.training.engine import build_engine
from megagpt.training.run import Run, continued

logger = logging.getLogger("megagpt")

_ABANDON_SECONDS = 120.0
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Session:
    """What a run works with while its ranks are together."""

    run: Run
    """As it was prepared."""
    groups: ProcessGroups
    """Of the layout."""
    engine: DeepSpeedEngine
    """Takes the steps."""
    batches: Batches
    """Of this rank's data-parallel index."""
    checkpointer: Checkpointer
    """Of the run folder."""
    state: CheckpointState
    """After the last step."""


@contextmanager
def start(run: Run) -> Iterator[Session]:
    """Builds everything, resumes where that is asked for, and takes it down at the end.

    After an error the checkpoints are given up; the last save may still be on its way to the disk.

    Raises:
        CheckpointRefused: On every rank, if the run folder or what is to be loaded is refused.
    """
    config = run.config
    assert config.model.vocab_size is not None  # from the data's manifest
    if run.rank == 0:
        _write_resolved(run)
    # First, and before minutes of building: over several hosts this one can fail by itself.
    agreement = Agreement(timedelta(minutes=config.checkpoint.timeout_minutes))
    groups = ProcessGroups(run.resolved.topology)
    device, dtype = _device(run), _DTYPES[config.training.precision]
    kernels = Kernels(config.training.kernels, device=device, dtype=dtype)
    model = build_model(
        config.model,
        seed=config.training.seed if run.load_path is None else None,
        dtype=dtype,
        ds_config=run.resolved.ds_config.values,
        parallel=config.parallel,
        groups=groups,
        recompute=config.training.activation_checkpointing,
        has_position_ids=config.data.document_masking,
        kernels=kernels,
        device=device,
    )
    engine = build_engine(
        model, config.optimizer, run.resolved.ds_config.values, groups, kernels=kernels
    )
    for line in kernels.table():
        logger.info(f"kernels: {line}")
    checkpointer = Checkpointer(
        run.directory / "checkpoints",
        engine,
        groups,
        layout=run.resolved.layout,
        vocab_size=config.model.vocab_size,
        config=config.checkpoint,
        agreement=agreement,
    )
    sampler = BatchSampler(
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.topology.data_parallel_size,
    )
    batches = Batches(
        run.datasets,
        sampler,
        config.training,
        config.data,
        end_of_document=run.end_of_document,
        has_dropout=config.model.dropout > 0,
        is_pinned=engine.device.type == "cuda",
    )
    try:
        state = _resume(run, checkpointer)
        _log_sizes(run)
        yield Session(run, groups, engine, batches, checkpointer, state)
    except BaseException:
        checkpointer.abandon(_ABANDON_SECONDS)
        raise
    checkpointer.close()
    batches.close()
    _remove_swap_files(run)


def _device(run: Run) -> torch.device:
    """What this rank computes on."""
    if run.resolved.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _resume(run: Run, checkpointer: Checkpointer) -> CheckpointState:
    """Loads the checkpoint; if it is damaged, the one before it in the same folder."""
    if run.load_path is None:
        return run.state
    saved, directory = checkpointer.load(run.load_path)
    try:
        state, overridden = continued(saved, run.state)
    except ValueError as error:  # of an older checkpoint than the one that was checked first
        raise CheckpointRefused(str(error)) from None
    for difference in overridden:
        logger.info(f"overridden: {difference}")
    logger.info(f"resumed from {directory} at step {state.step}")
    return state


def _write_resolved(run: Run) -> None:
    for name, text in (
        ("resolved_config.yaml", yaml.safe_dump(config_to_dict(run.config), sort_keys=False)),
        ("resolved_config.txt", run.resolved.table() + "\n"),
        ("resolved_ds_config.json", json.dumps(run.resolved.ds_config.values, indent=1) + "\n"),
    ):
        (run.directory / name).write_text(text)


def _log_sizes(run: Run) -> None:
    config, topology = run.config, run.resolved.topology
    sequence = " with sequence parallelism" if config.parallel.sequence_parallel else ""
    logger.info(
        f"parameters: {count_parameters(config.model):,} | tokens / micro-batch / rank: "
        f"{config.batch.micro_batch_size} x {config.model.seq_length} | tokens / step: "
        f"{config.batch.global_batch_size * config.model.seq_length:,} | ranks: "
        f"{topology.world_size} (data {topology.data_parallel_size} x tensor "
        f"{topology.tensor_parallel_size}{sequence} x pipeline "
        f"{topology.pipeline_parallel_size}) | ZeRO stage: {run.resolved.layout.zero_stage} | "
        f"precision: {config.training.precision} | device: {device_name(_device(run))}"
    )


def _remove_swap_files(run: Run) -> None:
    """Removes what NVMe offload left in the run folder; a path of the user's stays as it is."""
    dist.barrier()
    for key, source in run.resolved.ds_config.sources.items():
        if key.endswith(".nvme_path") and source == "derived":
            shutil.rmtree(run.directory / "nvme", ignore_errors=True)
