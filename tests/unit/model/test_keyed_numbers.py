"""Numbers by key and place: normal, independent, and equal to the last bit however they are cut."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from megagpt.model import keyed_numbers
from megagpt.model.keyed_numbers import GOLDEN, key_of, mix_, standard_normal

CPU = torch.device("cpu")


def normal(rows=range(2000), columns=range(500), *, key=7, width=500):
    return standard_normal(key, rows, columns, width=width, device=CPU)


def test_the_stream_is_splitmix64():
    # The first numbers of seed 1234567, as the reference program of the paper prints them.
    states = torch.tensor([1234567, 1234567 + GOLDEN]) + GOLDEN
    numbers = [int(number) % (1 << 64) for number in mix_(states)]
    assert numbers == [6457827717110365317, 3203168211198807973]


def test_a_matrix_is_standard_normal():
    values = normal().double().flatten()
    n = values.numel()
    # Four standard errors of each moment.
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((values**power).mean() - mean) < 4 * (variance / n) ** 0.5, power
    edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
    expected = torch.special.ndtr(edges)
    seen = (values.sort().values.unsqueeze(0) <= edges.unsqueeze(1)).double().mean(1)
    assert (seen - expected).abs().max() < 1.95 / n**0.5  # Kolmogorov and Smirnov, 0.1 %
    assert 4.3 < values.abs().max() < 6.5


@pytest.mark.parametrize("rows, columns", [(1, 0), (0, 1), (1, 1), (0, 2), (3, 0)])
def test_neighbours_are_independent(rows, columns):
    values = normal().double()
    shifted = values[rows:, columns:]
    other = values[: values.shape[0] - rows, : values.shape[1] - columns]
    for power in (1, 2):  # the radius that a pair shares would show in the squares
        a, b = (v**power - (v**power).mean() for v in (shifted, other))
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, power


def test_other_keys_give_other_numbers():
    a, b = (normal(key=key_of(1, name)).double() for name in ("layers.0", "layers.1"))
    assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5
    assert key_of(1, "a") == key_of(1, "a") != key_of(2, "a")


@pytest.mark.parametrize("width", [500, 501, 1])
def test_every_cut_is_the_same_to_the_last_bit(width, monkeypatch):
    whole = normal(columns=range(width), width=width)
    generator = np.random.default_rng(0)
    for _ in range(20):
        row, end_row = sorted(generator.choice(2001, 2, replace=False))
        column, end_column = sorted(generator.choice(width + 1, 2, replace=False))
        monkeypatch.setitem(keyed_numbers._PAIRS_AT_ONCE, "cpu", int(generator.integers(1, 3000)))
        part = normal(range(row, min(end_row, row + 40)), range(column, end_column), width=width)
        assert torch.equal(part, whole[row : row + len(part), column:end_column])


def test_the_logarithm_is_one_at_the_ends_too():
    bits = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    expected = torch.log((bits + 1).double() / 2**32)
    logarithm = keyed_numbers._log_of_uniform(bits.clone()).double()
    assert ((logarithm - expected).abs() < 1e-6).all() and (logarithm <= 0).all()


def test_every_set_of_vector_instructions_gives_the_same_bits():
    script = (
        "import hashlib, torch; from megagpt.model.keyed_numbers import standard_normal; "
        "v = standard_normal(7, range(301), range(1, 334), width=335, device=torch.device('cpu')); "
        "print(torch.backends.cpu.get_cpu_capability(), "
        "hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest())"
    )
    outputs = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        output = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        ).stdout.split()
        outputs[output[0].decode()] = output[1]
    assert len(set(outputs.values())) == 1, outputs
