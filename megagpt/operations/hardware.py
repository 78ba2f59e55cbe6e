"""What this machine computes on, and what that can do."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_KEPT_BYTES = 2**31 - 1  # free at the heap's end; the most that a C int holds


def cpu_computes_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this CPU (AVX-512 at least).

    Without them torch falls back to slow loops: on a machine with AVX2 only, a step of the demo
    took ten times as long in bf16 as in fp32.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def training_device(environment: MutableMapping[str, str] = os.environ) -> Literal["cpu", "cuda"]:
    """What this process trains on; DeepSpeed is told so by DS_ACCELERATOR.

    Raises:
        ValueError: Where torch is built for GPUs and this rank's does not start: it would train on
            the CPU in silence, or ranks of other hosts would wait for it.
    """
    import torch

    is_for_gpus = bool(torch.version.cuda or torch.version.hip)
    asked = environment.setdefault("DS_ACCELERATOR", "cuda" if is_for_gpus else "cpu")
    if asked == "cpu":
        return "cpu"
    if asked != "cuda" or not is_for_gpus:
        raise ValueError(
            f"DS_ACCELERATOR={asked} and torch {torch.__version__} was not built for it; give cpu, "
            "or cuda with a torch for GPUs"
        )
    host, number = socket.gethostname(), torch.cuda.device_count()
    remedy = "mend it, leave the host out, or train on the CPU with DS_ACCELERATOR=cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            f"host {host} has no GPU that starts, and torch {torch.__version__} is built for them; "
            f"see nvidia-smi there; {remedy}"
        )
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    if local_rank >= number:
        raise ValueError(
            f"host {host} has {number} GPUs and was given rank {local_rank} of its own (from 0); "
            f"start at most {number} ranks there, or look with nvidia-smi for one that is missing"
        )
    return "cuda"


def device_name(device: torch.device) -> str:
    """The name that its maker gave it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU ({next(names, 'unknown')})"


def keep_freed_memory() -> None:
    """Lets this process keep the memory of tensors that are freed, for the next ones.

    By default glibc gives every block of more than 32 MiB back to the system and asks for it again:
    each page of each large tensor of each step is then cleared anew. On a CPU only: elsewhere
    tensors are not in the host's memory. The process holds more for it, for small blocks come to
    lie between large ones: 4 % under ZeRO-1, 18 % under ZeRO-3 on two ranks (`benchmarks/step.py`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        # The bound for blocks of their own cannot rise above 32 MiB; there can be none of them.
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def share_cores(environment: MutableMapping[str, str] = os.environ) -> int | None:
    """Divides this host's cores among its ranks; torchrun gives each one, DeepSpeed gives all.

    Returns:
        Threads of this rank; None where OMP_NUM_THREADS says it, or there is one rank.
    """
    import torch

    local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1")
    if "OMP_NUM_THREADS" in environment or local == 1:
        return None
    threads = max(1, len(os.sched_getaffinity(0)) // local)
    environment["OMP_NUM_THREADS"] = str(threads)  # for what has not started its own yet
    torch.set_num_threads(threads)
    return threads
