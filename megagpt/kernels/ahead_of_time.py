"""Compiles every Triton kernel for GPUs that are not here, and reads what became of it.

What a GPU would show only as slowness is seen in the machine code: registers that spill to memory,
shared memory beyond what lets two programs stand on a processor, and elements that are loaded one
by one where a thread could take 16 bytes. Needs Triton's own tools, and no GPU.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.kernels.triton_support import num_warps, power_of_two

ARCHITECTURES = (80, 90, 100)
"""A100; H100 and H200; B200."""
MOST_SHARED_BYTES = 48 * 1024
"""So that several programs stand on a processor of each of them."""
_MOST_REGISTERS = 128
"""Of a thread: with 256 threads a program, two stand on a processor of 65,536."""
_DTYPES = {"fp32": "*fp32", "bf16": "*bf16"}
_SIZES = (512, 4096, 8192)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Launch:
    """One kernel with the types of its arguments and its constants."""

    op: str
    kernel: str
    dtype: str
    arguments: dict[str, str]
    """By name: Triton's words for types."""
    constants: dict[str, int]
    warps: int = 4

    @property
    def name(self) -> str:
        """Tells it from the others of its op."""
        sizes = " ".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.kernel} {self.dtype} {sizes}"


@dataclass(frozen=True)
class Compiled:
    """What a launch became on one architecture."""

    launch: Launch
    architecture: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    scalar_loads: int
    """Loads of less than 16 bytes by a thread, where the kernel's elements are loaded in rows."""
    vector_loads: int

    @property
    def faults(self) -> list[str]:
        """What would make it slow, in words."""
        found = []
        if self.stack_bytes or self.local_bytes:
            found.append(f"{self.stack_bytes} + {self.local_bytes} bytes of stack and local memory")
        if self.registers > _MOST_REGISTERS:
            found.append(f"{self.registers} registers, more than {_MOST_REGISTERS}")
        if self.shared_bytes > MOST_SHARED_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if not self.vector_loads:
            found.append("elements are loaded one by one")
        return found


def launches() -> Iterator[Launch]:
    """Every kernel, as training launches it, at sizes of small and large models."""
    for dtype, x in _DTYPES.items():
        yield Launch(
            *("dropout", "dropout", dtype),
            _typed("x:x stream:*i64 out:x size:i32 first:i64 threshold:i32 kept:fp32", x),
            {"BLOCK": 1024},
        )
        yield Launch(
            "swiglu", "forward", dtype, _typed("gate:x up:x out:x size:i32", x), {"BLOCK": 1024}
        )
        words = "gate:x up:x grad:x of_gate:x of_up:x size:i32"
        yield Launch("swiglu", "backward", dtype, _typed(words, x), {"BLOCK": 1024})
        for heads, key_heads, head_size in ((8, 8, 64), (32, 8, 128)):
            words = (
                "query:x key:x cos:x sin:x of_query:x of_key:x table_tokens:i32 query_heads:i32 "
                "key_heads:i32 half:i32"
            )
            blocks = {"QUERY_BLOCK": heads, "KEY_BLOCK": key_heads, "HALF": head_size // 2}
            constants = {"SIGN": 1, **blocks}
            warps = num_warps(heads * head_size // 2)
            yield Launch("rotary", "turn", dtype, _typed(words, x), constants, warps)
        for size in _SIZES:
            block = power_of_two(size)
            words = "x:x residual:x weight:x y:x z:x rstd:*fp32 size:i32 eps:fp32"
            constants = {"HAS_RESIDUAL": 1, "BLOCK": block}
            yield Launch(
                "rms_norm", "forward", dtype, _typed(words, x), constants, num_warps(block)
            )
            words = (
                "z:x weight:x rstd:*fp32 of_y:x of_z:x of_x:x parts:*fp32 rows:i32 run:i32 size:i32"
            )
            constants = {"HAS_OF_Z": 1, "BLOCK": block}
            yield Launch(
                "rms_norm", "backward", dtype, _typed(words, x), constants, num_warps(block)
            )
        op = "linear_cross_entropy"
        words = "logits:x index:*i64 out:*fp32 rows:i32 columns:i32 num_real:i32"
        yield Launch(op, "statistics", dtype, _typed(words, x), {"BLOCK": 4096}, 8)
        words = (
            "logits:x index:*i64 log_sum_exp:*fp32 scale:*fp32 target_scale:*fp32 columns:i32 "
            "num_real:i32"
        )
        yield Launch(op, "gradients", dtype, _typed(words, x), {"BLOCK": 4096}, 8)
        words = "tensor:x ratio:*fp32 tolerance:fp32 size:i32"
        yield Launch(op, "scale_unless_one", dtype, _typed(words, x), {"BLOCK": 1024})


def _typed(words: str, element: str) -> dict[str, str]:
    """`name:type` words, `x` for a pointer to elements."""
    pairs = (word.split(":") for word in words.split())
    return {name: element if kind == "x" else kind for name, kind in pairs}


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """The machine code's figures.

    Pointers and sizes count as multiples of 16, as Triton finds them to be in training: torch
    aligns tensors, and sizes of models are.
    """
    module = importlib.import_module(f"megagpt.kernels.{launch.op}.triton_kernels")
    return compile_kernel(getattr(module, launch.kernel), launch, architecture)


def compile_kernel(kernel: Any, launch: Launch, architecture: int) -> Compiled:
    """As `compile_launch`, of a kernel that is handed in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**launch.arguments, **{name: "constexpr" for name in launch.constants}}
    names = list(kernel.arg_names)
    signature = {name: signature[name] for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    whole = [
        (names.index(name),)
        for name, kind in launch.arguments.items()
        if kind.startswith("*") or (kind in ("i32", "i64") and name not in ("first", "threshold"))
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in whole}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.warps})
    registers, stack, _, local = _usage(compiled.asm["cubin"])
    loads = re.findall(r"ld\.global\S*", compiled.asm["ptx"])
    vectors = [load for load in loads if re.search(r"\.v[248]\.", load)]
    return Compiled(
        launch,
        architecture,
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        scalar_loads=len(loads) - len(vectors),
        vector_loads=len(vectors),
    )


def _usage(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack, shared and local bytes, as Triton's cuobjdump tells them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = _USAGE.search(told)
    assert match is not None, told
    return tuple(map(int, match.groups()))
