"""SwiGLU's kernels; each program takes a run of elements."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def forward(gate, up, out, size, BLOCK: tl.constexpr):
    """Silu(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    product = g * tl.sigmoid(g) * u
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(gate, up, grad, of_gate, of_up, size, BLOCK: tl.constexpr):
    """Both gradients; the sigmoid is computed again."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    slope = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(of_up + at, (d * g * s).to(of_up.dtype.element_ty), mask=inside)
    tl.store(of_gate + at, slope.to(of_gate.dtype.element_ty), mask=inside)
