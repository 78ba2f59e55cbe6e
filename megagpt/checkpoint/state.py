"""What a checkpoint says of itself: `state.json`, written last, so its presence means whole.

Knows nothing of torch. Next file: `saver.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.command_line import config_from_dict, config_to_dict
from megagpt.config.schema import Config

STATE_FILE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """Position of the run and the layout that its optimizer state belongs to."""

    step: int
    """Optimizer steps completed."""
    consumed_samples: int
    """Training samples completed."""
    consumed_tokens: int
    """Valid training tokens completed."""
    world_size: int
    """Ranks that wrote it."""
    zero_stage: int
    """ZeRO stage that wrote it."""
    offload: str
    """Where the optimizer state was: `none` or `cpu`."""
    data_fingerprint: dict
    """Sizes and hashes of the data, by split."""
    config: Config
    """The configuration that it was trained with."""


def write_state(directory: Path, state: CheckpointState) -> None:
    """Writes and flushes `state.json`."""
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    values["config"] = config_to_dict(state.config)
    with open(directory / STATE_FILE, "w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_state(directory: Path) -> CheckpointState:
    """Reads `state.json`.

    Raises:
        ValueError: If the folder holds no complete checkpoint, or the file is damaged.
    """
    path = directory / STATE_FILE
    try:
        values = json.loads(path.read_text())
        values["config"] = config_from_dict(values["config"])
        return CheckpointState(**values)
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no complete checkpoint ({STATE_FILE} is missing); name a "
            f"step_* folder "
            "or a run folder that has one"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); resume from an older "
            f"step_* folder"
        ) from None


def step_directory(checkpoints: Path, step: int) -> Path:
    """Folder of one step."""
    return checkpoints / f"step_{step:08d}"


def find_checkpoint(path: Path) -> Path:
    """The step folder meant by a path: itself, or the newest complete one of a run folder.

    Raises:
        ValueError: If there is none.
    """
    if (path / STATE_FILE).is_file():
        return path
    for root in (path / "checkpoints", path):
        complete = sorted(p.parent for p in root.glob(f"step_*/{STATE_FILE}"))
        if complete:
            return complete[-1]
    raise ValueError(
        f"{path} holds no complete checkpoint; train first, name another folder, "
        "or start afresh with --checkpoint.load none"
    )


def refuse_other_run(
    state: CheckpointState,
    config: Config,
    *,
    world_size: int,
    zero_stage: int,
    offload: str,
    data_fingerprint: dict,
) -> None:
    """Refuses to resume where model, data, batch, precision or layout differ, all in one line.

    Raises:
        ValueError: With each setting, the saved value and the one asked for.
    """
    differences = []
    sections = [("model", state.config.model, config.model)]
    for section, saved, wanted in sections:
        for field in dataclasses.fields(saved):
            a, b = getattr(saved, field.name), getattr(wanted, field.name)
            if a != b:
                differences.append(f"{section}.{field.name}: saved {a}, asked {b}")
    for name, a, b in (
        (
            "batch.global_batch_size",
            state.config.batch.global_batch_size,
            config.batch.global_batch_size,
        ),
        ("training.precision", state.config.training.precision, config.training.precision),
        ("training.seed", state.config.training.seed, config.training.seed),
        *(
            (
                f"parallel.{name}",
                getattr(state.config.parallel, name),
                getattr(config.parallel, name),
            )
            for name in ("tensor_parallel_size", "pipeline_parallel_size", "pipeline_partition")
        ),
        ("number of ranks", state.world_size, world_size),
        ("ZeRO stage", state.zero_stage, zero_stage),
        ("offload_optimizer", state.offload, offload),
        ("data", state.data_fingerprint, data_fingerprint),
    ):
        if a != b:
            differences.append(
                f"{name}: the files have changed"
                if name == "data"
                else f"{name}: saved {a}, asked {b}"
            )
    if differences:
        raise ValueError(
            "cannot resume, because this run differs from the checkpoint: "
            + "; ".join(differences)
            + "; give the saved values, or start afresh with --checkpoint.load none and "
            "another --output_dir"
        )
