"""RMSNorm's kernels; a row stands in the registers of one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(x, residual, weight, y, z, rstd, size, eps, HAS_RESIDUAL: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """One row: z = x + residual where there is one, y = z * rstd * weight."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    at = row * size + lane
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(z.dtype.element_ty)
        tl.store(z + at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # what backward will read
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / size + eps)
    tl.store(rstd + row, r)
    w = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (value * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(z, weight, rstd, of_y, of_z, of_x, parts, rows, run, size, HAS_OF_Z: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """A run of rows: their gradients, and their part of the weight's."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    w = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * run
    for row in range(first, tl.minimum(first + run, rows)):
        at = row * size + lane
        value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(of_y + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        part += d * value * r
        d *= w
        mean = tl.sum(d * value, axis=0) * r * r / size
        gradient = r * (d - value * mean)
        if HAS_OF_Z:
            gradient += tl.load(of_z + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + at, gradient.to(of_x.dtype.element_ty), mask=inside)
    tl.store(parts + program * size + lane, part, mask=inside)
