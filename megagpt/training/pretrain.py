"""From a command line to a finished run: arguments, process group, `Trainer`.

Next file: `trainer.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megagpt.config.command_line import parse_config
from megagpt.operations.prebuild import remove_stale_locks

if TYPE_CHECKING:
    from megagpt.training.train_step import StepResult
    from megagpt.training.trainer import Trainer

EXIT_REQUEUE = 75
"""Stopped by a signal with its state saved: start it again (EX_TEMPFAIL of sysexits.h)."""
DEMO_CONFIG = Path(__file__).resolve().parents[2] / "launch" / "demo.yaml"


def pretrain(arguments: list[str]) -> int:
    """Runs `launch/pretrain.py`.

    Returns:
        The exit code: 0 when the run, or the part of it that was asked for, is done; 75 when a
        signal stopped it and its state is saved.
    """
    return EXIT_REQUEUE if train(arguments) else 0


def train(arguments: list[str], on_step: Callable[[StepResult], bool | None] | None = None) -> bool:
    """Checks everything, joins the process group of the launcher, and trains.

    Returns:
        Whether a signal stopped it; its state is saved then.

    Args:
        arguments: The command line of `launch/pretrain.py`.
        on_step: As in `Trainer.run`.

    Raises:
        ValueError: For what a user can mend, on the first rank of a host; the others exit with 1.
    """
    try:
        trainer, device = _check_everything(arguments)
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The ranks of a host find the same fault: the first one tells it, and the launcher must
            # not end that one before it has.
            time.sleep(5)
            raise SystemExit(1) from None
        raise
    _initialise_process_group(device)
    import torch

    from megagpt.checkpoint.loader import CheckpointRefused
    from megagpt.checkpoint.saver import SaveFailed

    # After any other error ranks may be within a collective, and the end of a group waits for it.
    try:
        trainer.run(on_step)
    except (CheckpointRefused, SaveFailed):
        torch.distributed.destroy_process_group()
        if trainer.world.rank == 0:
            raise
        raise SystemExit(1) from None  # all ranks know of it; the first one tells
    torch.distributed.destroy_process_group()
    return trainer.is_interrupted


def _check_everything(arguments: list[str]) -> tuple[Trainer, Literal["cpu", "cuda"]]:
    """All that can be found wrong without other ranks; no process group exists yet."""
    config, ds_config, sources = parse_config(_demo_by_default(arguments))
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING, force=True)
    logging.getLogger("megagpt").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # Imported here: they take seconds, which --help and a wrong flag should not.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device: Literal["cpu", "cuda"] = "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda"
    # PyTorch's builder takes the ninja on PATH, and another version of it compiles every op anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # DeepSpeed 0.19.8 calls collectives under names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed loads compiled ops below; a lock left by a killed build would hang it for ever.
    remove_stale_locks()
    from megagpt.training.trainer import Trainer, World

    trainer = Trainer(
        config,
        ds_config,
        ds_config_path=sources.get("ds_config", "ds_config"),
        sources=sources,
        world=World.from_environment(),
        device=device,
    )
    return trainer, device


def _demo_by_default(arguments: list[str]) -> list[str]:
    """With no run configuration and no data named, the run is the demo's, in a folder of its own.

    Where the package is installed without the repository, there is none, and data must be named.
    The folder is named for DeepSpeed JSON and ranks, so that who tries several meets no old run.
    """
    is_named = any(a.startswith(("--config", "--preset", "--data.")) for a in arguments)
    if is_named or not DEMO_CONFIG.is_file():
        return arguments
    defaults = ["--config", str(DEMO_CONFIG)]
    if not any(a.startswith("--output_dir") for a in arguments):
        jsons = [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--ds_config"]
        name = Path(jsons[-1]).stem if jsons else "default"
        defaults += ["--output_dir", f"runs/{name}_ranks{os.environ.get('WORLD_SIZE', '1')}"]
    return [*defaults, *arguments]


def _initialise_process_group(device: str) -> None:
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False
    )
