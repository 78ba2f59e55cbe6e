"""Random numbers as functions of a key and a place, with no generator whose state could differ.

Of arithmetic that IEEE 754 rounds in one way only (integers, +, *, square root, one operation a
kernel, so that nothing is fused), never of a library's logarithm or sine: so a number is the same
to the last bit on every device, whatever part of a tensor is drawn and in whatever vectors.
Next files: `initialization.py`, `dropout.py`.
"""

from __future__ import annotations

import hashlib

import torch

from megagpt.kernels.splitmix import GOLDEN, mix_, shift_right, signed

_PAIRS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""On a CPU what its cache holds, on a GPU what keeps it busy."""

# Least largest error on the interval, in float32's reach. log(1 + f) / f for f from sqrt(1/2) - 1
# to sqrt(2) - 1; sin(pi/2 t) / t and cos(pi/2 t) in t^2 for t from -1 to 1. Lowest power first.
_LOG = (
    *(0.9999999403953552, -0.500003457069397, 0.3333560824394226, -0.24971559643745422),
    *(0.1988423615694046, -0.17212428152561188, 0.163381427526474, -0.10378706455230713),
)
_SINE = (
    *(1.5707963705062866, -0.6459637880325317, 0.07968992739915848, -0.004674157593399286),
    0.00015167852689046413,
)
_COSINE = (
    *(0.9999999403953552, -1.2336982488632202, 0.2536507546901703, -0.020810628309845924),
    0.0008581906440667808,
)
_LOG_2 = 0.6931471824645996
_SQRT_HALF_BITS = 0x3F3504F3  # of sqrt(1/2) in float32


def key_of(*words: object) -> int:
    """An int64 key: equal for equal words, else as good as random."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return signed(int.from_bytes(digest[:8], "little"))


def standard_normal(
    key: int, rows: range, columns: range, *, width: int, device: torch.device
) -> torch.Tensor:
    """A box of a matrix of standard normal numbers.

    Two neighbours in a row are made of one number of the key's stream (Box and Muller 1958,
    https://doi.org/10.1214/aoms/1177706645): its upper half gives the radius, its lower the angle.

    Args:
        key: Of the matrix, see `key_of`.
        rows: Of the box; consecutive.
        columns: Of the box; consecutive.
        width: Columns of the whole matrix.
        device: Where they are made.

    Returns:
        [rows, columns], float32.
    """
    first, end = columns.start // 2, (columns.stop + 1) // 2  # pairs that the box meets
    pairs_a_row = (width + 1) // 2
    box = torch.empty(len(rows), end - first, 2, dtype=torch.float32, device=device)
    step = max(1, _PAIRS_AT_ONCE[device.type] // max(1, end - first))
    in_row = torch.arange(first, end, device=device)
    for begin in range(0, len(rows), step):
        numbers = torch.arange(begin, min(begin + step, len(rows)), device=device)
        state = (numbers + rows.start).mul_(pairs_a_row).unsqueeze(1) + in_row
        state.add_(1).mul_(GOLDEN).add_(key)
        _fill_pairs(mix_(state), box[begin : begin + step])
    left = columns.start - 2 * first
    return box.flatten(1)[:, left : left + len(columns)]


def _fill_pairs(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Two normal numbers, [..., 2], of 64 random bits."""
    radius = _log_of_uniform(shift_right(bits, 32))
    radius.mul_(-2.0).clamp_(min=0.0).sqrt_()
    low = bits.bitwise_and_(0xFFFFFFFF)
    # 31 bits of angle, over the right half of the circle, and one of the side.
    angle = (low >> 1).sub_(1 << 30).float().mul_(2.0**-30)
    side = low.bitwise_and_(1).mul_(2).sub_(1).float()
    square = angle * angle
    torch.mul(_polynomial(_SINE, square).mul_(angle), radius, out=out[..., 1])
    torch.mul(_polynomial(_COSINE, square).mul_(side), radius, out=out[..., 0])


def _log_of_uniform(bits: torch.Tensor) -> torch.Tensor:
    """log((bits + 1) / 2^32) of 32 random bits, in float32."""
    uniform = bits.add_(1).float()  # 1 to 2^32
    word = uniform.view(torch.int32)
    # 2^exponent * (1 + fraction), the fraction from sqrt(1/2) - 1 to sqrt(2) - 1
    exponent = (word - _SQRT_HALF_BITS) >> 23
    fraction = (word - (exponent << 23)).view(torch.float32).sub_(1.0)
    log = _polynomial(_LOG, fraction).mul_(fraction)
    return log.add_(exponent.sub_(32).float().mul_(_LOG_2))


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """Horner's scheme."""
    value = x * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
