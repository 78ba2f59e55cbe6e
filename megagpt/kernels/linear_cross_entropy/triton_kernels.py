"""Row passes' kernels; a program takes a row of logits, block by block."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
SCALED_BLOCK = 1024


@triton.jit
def statistics(logits, index, out, rows, columns, num_real, BLOCK: tl.constexpr):
    """Largest, sum of exp(. - largest) and the target's logit; one pass, the sum moved along."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # Of each lane for itself: one reduction at the end.
    largest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, num_real, BLOCK):
        at = begin + lane
        value = tl.load(logits + row * columns + at, mask=at < num_real, other=-float("inf")).to(
            tl.float32
        )
        top = tl.maximum(largest, value)
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = top
    top = tl.max(largest, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(out + row, top)
    tl.store(out + rows + row, tl.sum(total * tl.exp(largest - shift), axis=0))
    target = tl.load(index + row)
    score = tl.load(logits + row * columns + target, mask=target >= 0, other=0.0)
    tl.store(out + 2 * rows + row, score.to(tl.float32))


@triton.jit
def gradients(logits, index, log_sum_exp, scale, target_scale, columns, num_real,
              BLOCK: tl.constexpr):  # fmt: skip
    """In place: scale * exp(. - log_sum_exp) - target_scale at the target, 0 behind num_real."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    shift, factor = tl.load(log_sum_exp + row), tl.load(scale + row)
    target, less = tl.load(index + row), tl.load(target_scale + row)
    for begin in range(0, columns, BLOCK):
        at = begin + lane
        place = logits + row * columns + at
        value = tl.load(place, mask=at < num_real, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(value - shift) * factor - tl.where(at == target, less, 0.0)
        gradient = tl.where(at < num_real, gradient, 0.0)
        tl.store(place, gradient.to(logits.dtype.element_ty), mask=at < columns)


@triton.jit
def scale_unless_one(tensor, ratio, tolerance, size, BLOCK: tl.constexpr):
    """In place; where the ratio is one, a program reads that and nothing else."""
    factor = tl.load(ratio).to(tl.float32)
    if not (tl.abs(factor - 1.0) <= tolerance):  # NaN too
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(tensor + at, (value * factor).to(tensor.dtype.element_ty), mask=at < size)
