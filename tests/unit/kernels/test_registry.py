"""Who gets which back end, and why."""

import importlib

import pytest
import torch

from megagpt.kernels.registry import BACKENDS, REFERENCE, Kernels

CPU = torch.device("cpu")
SIZES = {"size": 64, "head_size": 64, "rows": 64}


@pytest.mark.parametrize("op", BACKENDS)
@pytest.mark.parametrize("requested", ["auto", "cpu", "reference", "triton"])
def test_a_choice_is_made_with_its_reason_or_refused_with_it(op, requested):
    kernels = Kernels(requested, device=CPU, dtype=torch.float32)
    if requested == "triton" and {"triton", "cuda"} & set(BACKENDS[op]):
        with pytest.raises(ValueError, match=f"training.kernels=triton, but {op} .* GPUs"):
            kernels.choose(op, **SIZES)
        return
    function = kernels.choose(op, **SIZES)
    (choice,) = kernels.choices
    expected = "cpu" if requested in ("auto", "cpu") else "reference"
    assert choice.backend == expected and choice.reason
    module = importlib.import_module(f"megagpt.kernels.{op}.{expected}")
    assert function is getattr(module, op)


@pytest.mark.parametrize("op", BACKENDS)
def test_types_that_a_back_end_does_not_know_take_the_definition_and_say_so(op):
    kernels = Kernels("auto", device=CPU, dtype=torch.float64)
    kernels.choose(op, **SIZES)
    (choice,) = kernels.choices
    assert choice.backend == "reference" and "not float64" in choice.reason


def test_the_table_counts_layers_that_got_the_same():
    kernels = Kernels("reference")
    for size in (64, 64, 32):
        kernels.choose("rms_norm", size=size)
    lines = kernels.table()
    assert [line.split()[3] for line in lines[1:]] == ["2", "1"]
    assert REFERENCE.requested == "reference"
