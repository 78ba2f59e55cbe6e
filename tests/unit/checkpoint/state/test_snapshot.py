"""The copy in host memory is what the optimizer had at its moment, over any number of chunks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megagpt.checkpoint.format.slices import whole
from megagpt.checkpoint.state import snapshot
from megagpt.checkpoint.state.optimizer_state import optimizer_state
from megagpt.checkpoint.state.parts import Part
from megagpt.checkpoint.state.snapshot import HostCopy, live_tensors


def gathered(tensors):
    found = {}
    for kind, part, values in tensors:
        key = (kind, part.name)
        found[key] = np.concatenate([found.get(key, values[:0]), values])
    return found


@pytest.mark.parametrize("chunk", [1, 7, 10, 30, 1000])
def test_copy_over_any_chunks_keeps_the_state_of_its_moment(monkeypatch, chunk):
    monkeypatch.setattr(snapshot, "_CHUNK_ELEMENTS", chunk)
    shapes = {"a": (5, 4), "b": (3,), "c": (10,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    owned = {"a": (3, 17), "b": (0, 3), "c": None}  # another rank writes c
    units = [[Part(name, shape, whole(shape), owned[name]) for name, shape in shapes.items()]]
    state = optimizer_state(SimpleNamespace(optimizer=optimizer))
    copy = HostCopy(state, units, torch.device("cpu"))
    for _ in range(2):  # the memory is used again

        def step():
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

        step()
        expected = {key: v.copy() for key, v in gathered(live_tensors(state, units)).items()}
        copy.fill()
        step()
        found = gathered(copy.tensors())
        assert found.keys() == expected.keys() and len(found) == 6
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values)
