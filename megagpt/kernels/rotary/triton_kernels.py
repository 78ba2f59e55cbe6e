"""Rotary positions' kernel; a program turns all heads of one token, queries and keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turn(x, out, cosine, sine, pair, inside, half):
    a = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + pair + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, (a * cosine - b * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + pair + half, (b * cosine + a * sine).to(out.dtype.element_ty), mask=inside)


@triton.jit
def turn(
    query, key, cos, sin, of_query, of_key, table_tokens, query_heads, key_heads, half,
    SIGN: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """By the angles, or back (SIGN -1); [tokens, heads, 2 half] each."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, HALF)[None, :]
    place = (token % table_tokens) * half + lane
    in_head = lane < half
    cosine = tl.load(cos + place, mask=in_head, other=0.0).to(tl.float32)
    sine = SIGN * tl.load(sin + place, mask=in_head, other=0.0).to(tl.float32)
    head = tl.arange(0, QUERY_BLOCK)[:, None]
    pair = (token * query_heads + head) * 2 * half + lane
    _turn(query, of_query, cosine, sine, pair, in_head & (head < query_heads), half)
    head = tl.arange(0, KEY_BLOCK)[:, None]
    pair = (token * key_heads + head) * 2 * half + lane
    _turn(key, of_key, cosine, sine, pair, in_head & (head < key_heads), half)
