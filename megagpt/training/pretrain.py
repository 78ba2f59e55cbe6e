"""From a command line to a finished run, in three steps: prepare, start, loop.

Next files: `run.py`, `start.py`, `loop.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config.command_line import parse_config
from megagpt.config.refusals import Device
from megagpt.operations.hardware import keep_freed_memory, share_cores, training_device
from megagpt.operations.prebuild import prepare_builds
from megagpt.parallel.network import prepare_network

if TYPE_CHECKING:
    from megagpt.training.followers.record import StepRecord
    from megagpt.training.loop import OnStep
    from megagpt.training.run import Run

logger = logging.getLogger("megagpt")

EXIT_REQUEUE = 75
"""Stopped by a signal with its state saved: start it again (EX_TEMPFAIL of sysexits.h)."""
EXIT_DIVERGED = 3
"""Loss or gradients were not finite for too long; a restart would do the same again."""
DEMO_CONFIG = Path(__file__).resolve().parents[2] / "launch" / "demo.yaml"


def pretrain(arguments: list[str], on_step: OnStep | None = None) -> int:
    """Prepares the run, joins the launcher's process group, starts, and goes through the loop.

    Args:
        arguments: The command line of `launch/pretrain.py`.
        on_step: As in `megagpt.training.loop.loop`.

    Returns:
        The exit code: 0 when the run, or the part of it that was asked for, is done; 75 when a
        signal stopped it and its state is saved; 3 when its steps were not finite any more.

    Raises:
        ValueError: For what a user can mend, on the first rank of a host; the others exit with 1.
    """
    with _told_once():
        config, ds_config, sources = parse_config(_demo_by_default(arguments))
        device = _prepare_process()
        # Imported here: they take seconds, which --help and a wrong flag should not.
        from megagpt.training.run import prepare_run, resolve_run, with_start_of_rank_0

        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        resolved = resolve_run(config, ds_config, sources=sources, world_size=size, device=device)
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        run = prepare_run(resolved, rank=rank, is_first_of_host=is_first)
    with _process_group(device, config.parallel.startup_timeout_minutes):
        from megagpt.training.followers.stopping import is_finished
        from megagpt.training.loop import loop
        from megagpt.training.start import start

        run = with_start_of_rank_0(run)
        run.announce()
        training = run.config.training
        if is_finished(training, run.state):
            logger.info(
                f"nothing to do: step {run.state.step} of {training.train_steps} is already "
                f"trained in {run.directory}; raise its limit to go on"
            )
            return 0
        with start(run) as session:
            last = loop(session, on_step)
            if run.rank == 0 and last is not None and last.verdict.is_diverged:
                print(_told_of_divergence(run, last), file=sys.stderr, flush=True)
    if last is None:
        return 0
    if last.verdict.is_diverged:
        return EXIT_DIVERGED
    return EXIT_REQUEUE if last.verdict.is_signalled else 0


def _told_of_divergence(run: Run, last: StepRecord) -> str:
    """The error, in one line, with the step to go back to."""
    from megagpt.checkpoint.directory import find_checkpoint

    try:
        good = f"the last good checkpoint is {find_checkpoint(run.directory)}"
    except ValueError:
        good = "there is no checkpoint before"
    step, limit = last.state.step, run.config.training.max_nonfinite_steps
    what = f"the weights are not finite after step {step}"
    if last.num_nonfinite:
        what = (
            f"loss or gradient norm was not finite in steps {step - last.num_nonfinite + 1} to "
            f"{step} (training.max_nonfinite_steps={limit})"
        )
    return (
        f"error: {what}; {good}; lower the learning rate or look at the data of these steps, then "
        "resume from it"
    )


@contextmanager
def _told_once() -> Iterator[None]:
    """The ranks of a host find the same fault; the first one tells it."""
    try:
        yield
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The launcher must not end the first one before it has told.
            time.sleep(5)
            raise SystemExit(1) from None
        raise


def _prepare_process() -> Device:
    """Logging, and what torch and DeepSpeed read from the environment; the device to train on."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    device = training_device()
    share_cores()
    if device == "cpu":
        keep_freed_memory()
    # DeepSpeed 0.19.8 calls collectives under names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed loads compiled ops; a lock left by a killed build would hang it for ever.
    prepare_builds()
    return device


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


@contextmanager
def _process_group(device: Device, timeout_minutes: float) -> Iterator[None]:
    """Joins the launcher's ranks; leaves them at the end, or where all have met the same error.

    After any other error ranks may be within a collective, and the end of a group waits for it.
    """
    import deepspeed
    import torch

    from megagpt.checkpoint.loader import CheckpointRefused
    from megagpt.checkpoint.saver import SaveFailed
    from megagpt.parallel.shared_memory import release_shared_memory

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
    prepare_network()
    if device == "cuda":
        # The first collectives come before DeepSpeed's engine, which sets it too.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=timeout_minutes),
    )
    if device == "cpu":
        release_shared_memory()
    try:
        yield
    except (CheckpointRefused, SaveFailed):
        torch.distributed.destroy_process_group()
        if os.environ["RANK"] == "0":
            raise
        raise SystemExit(1) from None  # all ranks know of it; the first one tells
    torch.distributed.destroy_process_group()
