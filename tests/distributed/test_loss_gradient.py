"""The trainer tells the loss what backward will hand it: its gradients are never scaled again."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_cells import prepare_data, train  # noqa: E402

from megagpt.kernels.linear_cross_entropy import chunked, cpu  # noqa: E402
from megagpt.testing.distributed import run_distributed  # noqa: E402

PIPELINE = ("--parallel.pipeline_parallel_size", "2")
TENSOR = ("--parallel.tensor_parallel_size", "2")
# Each step has 4 micro-batches on one pipeline or tensor-parallel group, 2 on each of two ranks.
CELLS = {
    "zero0": ("zero0", "fp32", ()),
    "zero1 bf16": ("zero1", "bf16", ()),
    "zero2": ("zero2", "fp32", ()),
    "zero3 bf16": ("zero3", "bf16", ()),
    "zero3 offload": ("zero3_offload", "fp32", ()),
    "tensor": ("zero1", "fp32", TENSOR),
    "pipeline bf16": ("pipeline", "bf16", PIPELINE),
}


def ratios_of_cells(rank, world_size, data, root):
    """Of each cell, what came to the loss over what was told, at every backward pass."""
    found = {}
    for name, (zero, precision, extra) in CELLS.items():
        ratios = found[name] = []

        def scale(self, tensors, ratio, tolerance, ratios=ratios):
            ratios.append(ratio.item())

        cpu._Rows.scale_unless_one_ = scale
        train(rank, world_size, data, Path(root) / name, zero, precision, exit_step=2, extra=extra)
    return found


@pytest.fixture(scope="module")
def ratios(tmp_path_factory):
    data = prepare_data(tmp_path_factory.mktemp("data"))
    root = tmp_path_factory.mktemp("runs")
    return run_distributed(ratios_of_cells, 2, str(data), str(root), timeout_seconds=300)


@pytest.mark.parametrize("cell", CELLS)
def test_what_comes_to_the_loss_is_what_was_told(cell, ratios):
    by_rank = [rank[cell] for rank in ratios]
    # Two steps; of a pipeline the last stage only has a loss.
    assert sorted(map(len, by_rank)) == {"tensor": [8, 8], "pipeline bf16": [0, 8]}.get(
        cell, [4, 4]
    )
    for ratio in (ratio for rank in by_rank for ratio in rank):
        assert abs(ratio - 1.0) <= chunked._SAME, ratio
