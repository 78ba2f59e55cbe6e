"""Runs a function on n ranks; started once, they run as many cells as the function holds.

On the CPU over gloo, or with DS_ACCELERATOR=cuda in the environment on a GPU each over NCCL.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEVICE: Literal["cpu", "cuda"] = "cuda" if os.environ.get("DS_ACCELERATOR") == "cuda" else "cpu"
"""What tests compute on; DeepSpeed reads the same variable."""


def most_ranks() -> int:
    """How many ranks can run: on GPUs one each, on the CPU as many as anyone wants."""
    return torch.cuda.device_count() if DEVICE == "cuda" else sys.maxsize


def _rank_main(
    rank: int, function: Callable, arguments: tuple, results: Any, world: dict, num_threads: int
) -> None:
    world_size = world["world_size"]
    os.environ.update(
        DS_ACCELERATOR=DEVICE,
        # Another ninja than that of make compiles every op anew.
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
    )
    torch.set_num_threads(num_threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives under names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        if DEVICE == "cuda":
            torch.cuda.set_device(rank)
            world |= {"device_id": torch.device("cuda", rank)}
        dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl", rank=rank, **world)
        results.put((rank, function(rank, world_size, *arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None


def run_distributed(
    function: Callable,
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = 120,
    num_threads: int = 1,
) -> list[Any]:
    """Calls function(rank, world_size, *arguments) on every rank of a new world.

    Args:
        function: Defined at the top level of a module; its result must be picklable.
        world_size: Processes; at most `most_ranks()`.
        *arguments: Picklable.
        timeout_seconds: After this, all are killed.
        num_threads: Of PyTorch, on each rank.

    Returns:
        The result of each rank.

    Raises:
        RuntimeError: With the traceback of the first rank that failed, or on timeout.
    """
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    collected: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        world = {
            "init_method": f"file://{directory}/rendezvous",
            "world_size": world_size,
            "timeout": timedelta(seconds=timeout_seconds),
        }
        common = (function, arguments, queue, world, num_threads)
        processes = [
            context.Process(target=_rank_main, args=(rank, *common)) for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout_seconds
            while len(collected) < world_size:
                if not queue.empty():
                    rank, result, error = queue.get()
                    if error is not None:
                        raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
                    collected[rank] = result
                    continue
                dead = [r for r, p in enumerate(processes) if p.exitcode and r not in collected]
                if dead and queue.empty():
                    raise RuntimeError(f"rank {dead[0]} died, exit {processes[dead[0]].exitcode}")
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"no result of {sorted(set(range(world_size)) - set(collected))} "
                        f"in {timeout_seconds} s"
                    )
                time.sleep(0.02)
            for process in processes:
                process.join(timeout=30)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [collected[rank] for rank in range(world_size)]


def free_port() -> str:
    """A port of this host that nobody listens on, for a launcher's rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def release_groups() -> None:
    """Destroys the process groups of what has ended; every rank calls it at the same place.

    A gloo group has a thread that wakes a hundred times a second, and each run makes a dozen. The
    world stays, and what DeepSpeed keeps in its globals for the next engine.
    """
    kept = vars(sys.modules.get("deepspeed.utils.groups", dist)).values()
    held = {id(group) for group in (dist.group.WORLD, *kept)}
    for group in list(dist.distributed_c10d._world.pg_map):
        if id(group) not in held:
            dist.destroy_process_group(group)
