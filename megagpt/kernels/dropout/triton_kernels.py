"""Keyed dropout's kernel; each program takes a run of one sample's elements."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def dropout(x, stream, out, size, first, threshold, kept, BLOCK: tl.constexpr):
    """X / kept where the element's number is not below the threshold, else 0."""
    sample = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    z = (element + (first + 1)).to(tl.uint64) * 0x9E3779B97F4A7C15
    z += tl.load(stream + sample).to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    number = ((z ^ (z >> 31)) >> 40).to(tl.int32)
    value = tl.load(x + sample * size + element, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(number >= threshold, value / kept, 0.0)
    tl.store(out + sample * size + element, value.to(out.dtype.element_ty), mask=inside)
