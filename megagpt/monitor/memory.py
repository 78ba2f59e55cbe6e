"""Memory of this process under Megatron's `mem-*` tags."""

import resource

import torch


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes: the allocator's figures on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return {
            "mem-allocated-bytes": torch.cuda.memory_allocated(),
            "mem-max-allocated-bytes": torch.cuda.max_memory_allocated(),
            "mem-reserved-bytes": torch.cuda.memory_reserved(),
        }
    with open("/proc/self/statm") as file:
        resident_pages = int(file.read().split()[1])
    return {
        "mem-allocated-bytes": resident_pages * resource.getpagesize(),
        # ru_maxrss is in KiB on Linux
        "mem-max-allocated-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
