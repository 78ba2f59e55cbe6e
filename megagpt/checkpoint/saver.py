"""Saving and loading a run: DeepSpeed's own files in a step folder that appears only when whole.

The two functions are the room's face. Optimizer state is DeepSpeed's and is tied to the layout
that wrote it; `weights.safetensors` holds the fp32 weights by canonical name, for inference.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import deepspeed
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megagpt.checkpoint.state import CheckpointState, step_directory, write_state
from megagpt.checkpoint.weights import WEIGHTS_FILE, gather_weights
from megagpt.parallel.groups import ProcessGroups

_ENGINE_TAG = "engine"


def _agree(error: OSError | None) -> None:
    """Raises on every rank if any rank failed, so that none waits for another."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    failed = [f"rank {rank}: {m}" for rank, m in enumerate(messages) if m is not None]
    if failed:
        raise OSError(
            f"checkpoint not saved ({'; '.join(failed)}); free space or name a writable "
            f"--output_dir; "
            "earlier checkpoints are untouched"
        )


@contextmanager
def _recorded_write_errors(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[OSError]]:
    """Collects this rank's failed writes, so that it still reaches DeepSpeed's closing barrier.

    `engine.save_checkpoint` ends in a barrier (0.19.8); a rank that raised before it would leave
    the others waiting there. torch.save reports a full disk as RuntimeError.
    """
    errors: list[OSError] = []
    write = engine.checkpoint_engine.save

    def save(*arguments: Any, **options: Any) -> None:
        try:
            write(*arguments, **options)
        except (OSError, RuntimeError) as caught:
            errors.append(OSError(str(caught).splitlines()[0]))

    engine.checkpoint_engine.save = save
    try:
        yield errors
    finally:
        engine.checkpoint_engine.save = write


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    checkpoints: Path,
    state: CheckpointState,
    groups: ProcessGroups,
) -> Path:
    """Writes a step folder; a collective.

    Every rank writes its shard into a staging folder; when all have succeeded, rank 0 renames it.
    A kill at any moment leaves either the whole step folder or none.

    Returns:
        The step folder.

    Raises:
        OSError: On every rank, if any rank could not write.
    """
    rank = dist.get_rank()
    target = step_directory(checkpoints, state.step)
    staging = checkpoints / f".staging_{target.name}"
    error: OSError | None = None
    if rank == 0:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as caught:
            error = caught
    _agree(error)
    with _recorded_write_errors(engine) as errors:
        engine.save_checkpoint(str(staging), tag=_ENGINE_TAG, save_latest=False)
    _agree(errors[0] if errors else None)
    vocab_size = state.config.model.vocab_size
    assert vocab_size is not None
    weights = gather_weights(engine, groups, vocab_size=vocab_size)
    if rank == 0:
        try:
            save_file(weights, str(staging / WEIGHTS_FILE))
            for script in staging.glob("*.py"):
                script.unlink()  # DeepSpeed drops conversion scripts; nothing here is to be run
            write_state(staging, state)
            for path in [*staging.rglob("*"), staging]:
                _flush(path)
            if target.exists():  # a half-deleted step must not look like a whole one
                old = checkpoints / f".old_{target.name}"
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)
            os.replace(staging, target)
            shutil.rmtree(checkpoints / f".old_{target.name}", ignore_errors=True)
            _flush(checkpoints)
        except (OSError, SafetensorError) as caught:
            error = OSError(str(caught))
    _agree(error)
    return target


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, directory: Path) -> None:
    """Restores weights and optimizer of the same layout, to the last bit; a collective.

    Args:
        engine: Built for the layout that `refuse_other_run` has accepted.
        directory: A step folder.

    Raises:
        ValueError: If DeepSpeed finds nothing to load there.
    """
    remedy = "resume from an older step_* folder"
    try:
        loaded, _ = engine.load_checkpoint(
            str(directory), tag=_ENGINE_TAG, load_lr_scheduler_states=False
        )
    except (RuntimeError, EOFError, UnpicklingError, KeyError) as caught:
        reason = str(caught).splitlines()[0]
        raise ValueError(f"{directory} is damaged ({reason}); {remedy}") from None
    if loaded is None:
        raise ValueError(f"{directory} holds no state of the engine; {remedy}")
    dist.barrier()
