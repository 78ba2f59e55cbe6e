"""torch's fake tensors on a CUDA device that is not there, in a CPU build of torch.

A fake tensor has a device, a shape and a type but no memory; operations on it give fake tensors of
the right kind, autograd included. `guard.cpp` is what a CPU build lacks for the device `cuda`.
Next file: `fake_model.py`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

aten, prim = torch.ops.aten, torch.ops.prim

_CUDA_KERNELS = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
"""Single kernels of a CUDA build that a CPU build takes apart, with more temporaries."""
_WITH_CPU_SCALARS = (aten.lift_fresh.default, aten.fill_.Tensor)
"""What `tensor[..] = number` calls: the number is a CPU tensor, which the kernel takes by value."""
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def compile_guard(directory: Path) -> Path:
    """The library of `guard.cpp`, compiled in about 2 seconds for the torch that is installed."""
    library = directory / "guard.so"
    command = [os.environ.get("CXX") or "c++", "-std=c++20", "-O0", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in include_paths()]
    command += [str(Path(__file__).with_name("guard.cpp")), "-o", str(library)]
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return library


@lru_cache
def _register_kernels() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for name in _CUDA_KERNELS:
        # That there is one is what autograd looks at; fake tensors never call it.
        library.impl(name, lambda *_: NotImplemented, "CUDA")
    return library


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """New tensors are fake; real ones are refused. The process must have loaded the guard."""
    _register_kernels()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def _waits(func: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether the host needs values of the device before it can go on."""
    if func in _INDEXING:  # with a mask, the number of elements is such a value
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


class DeviceOnly(TorchDispatchMode):
    """Raises an AssertionError at the first operation that waits for the device or leaves it.

    Attributes:
        seen: Names of the operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is prim.device.default:  # asks a fake tensor where it is: most of the calls
            return func(*args)
        assert not _waits(func, args), f"{func} makes the host wait for the device"
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cuda":
                assert tensor.dim() == 0 and func in _WITH_CPU_SCALARS, (
                    f"{func} takes or gives a tensor of {list(tensor.shape)} on {tensor.device}"
                )
        self.seen.add(func.name())
        return result


class HostTraffic(TorchDispatchMode):
    """Writes down what goes between host and device; each value that the host reads is 0.

    Attributes:
        moves: Device that is moved to, and shape, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.moves.append(("cpu", ()))
            return 0
        result = func(*args, **(kwargs or {}))
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            if result.device != source.device:
                self.moves.append((result.device.type, tuple(result.shape)))
        return result
