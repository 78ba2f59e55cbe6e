"""Every Triton kernel, compiled for GPUs that are not here: no spills, no element by element."""

import importlib.util
import os
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    reason = "triton is not installed; pip install triton"
    if os.environ.get("CI"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from megagpt.kernels.ahead_of_time import (
    ARCHITECTURES,
    Compiled,
    Launch,
    compile_kernel,
    compile_launch,
    launches,
)
from megagpt.kernels.registry import BACKENDS

LAUNCHES = list(launches())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit_the_registers_and_load_in_vectors(architecture):
    faults = {
        f"{launch.op} {launch.name}": compiled.faults
        for launch in LAUNCHES
        if (compiled := compile_launch(launch, architecture)).faults
    }
    assert not faults, faults


def test_every_kernel_of_every_op_is_compiled():
    for op in (op for op, backends in BACKENDS.items() if "triton" in backends):
        module = importlib.import_module(f"megagpt.kernels.{op}.triton_kernels")
        # Those that a host launches: the others are called by them.
        kernels = {
            name
            for name, value in vars(module).items()
            if isinstance(value, triton.runtime.JITFunction) and not name.startswith("_")
        }
        for dtype in ("fp32", "bf16"):
            compiled = {x.kernel for x in LAUNCHES if x.op == op and x.dtype == dtype}
            assert compiled == kernels, op


@triton.jit
def scattered(x, out, size, BLOCK: tl.constexpr):
    """Loads every seventh element."""
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + 7 * lane, mask=lane < size, other=0.0))


def test_elements_that_are_loaded_one_by_one_are_seen():
    arguments = {"x": "*fp32", "out": "*fp32", "size": "i32"}
    launch = Launch("planted", "scattered", "fp32", arguments, {"BLOCK": 1024})
    assert "one by one" in " ".join(compile_kernel(scattered, launch, 90).faults)


def test_registers_that_spill_are_seen():
    large = next(x for x in LAUNCHES if x.kernel == "backward" and x.constants["BLOCK"] == 8192)
    faults = " ".join(compile_launch(replace(large, warps=4), 90).faults)
    assert "stack and local memory" in faults and "registers" in faults


def test_limits_are_looked_at():
    fine = Compiled(LAUNCHES[0], 90, 32, 0, 0, 0, 0, 4)
    assert not fine.faults
    for change in ({"registers": 129}, {"shared_bytes": 2**17}, {"stack_bytes": 8}):
        assert replace(fine, **change).faults
