"""Any layout resumes what any layout saved: the same losses, and back again to the last bit.

Each layout of a model trains to the same step and saves. Then each layout loads each of those
checkpoints and trains on, beside the layout that wrote it and trained on itself. Before its first
step it also saves what it has loaded, which must hold the very bits of the checkpoint it came from:
so A -> B -> A is bit-equal for every pair.
"""

import shutil

import numpy as np
import pytest
from resume_cells import prepare, prepare_data, train

from megagpt.config.layout import Layout
from megagpt.testing.distributed import run_distributed

SAVED, FURTHER = 6, 11
# What `make parity` allows between layouts over its 20 steps; the first step has seen no update.
FIRST_LOSS, LOSS, GRAD_NORM = 1e-6, 2e-6, 1e-4
LAYOUTS = {
    "gpt2": (
        *("zero0", "dp2-zero1", "dp2-zero3", "tp2-zero2", "pp2-zero1"),
        *("dp2-zero2-offload_optimizer_cpu", "tp2-dp2-zero3", "pp2-dp2-zero0"),
    ),
    "llama": (
        *("zero1", "dp2-zero2", "tp2-sp-zero0", "dp2-zero3-offload_cpu", "dp4-zero3"),
        *("tp2-pp2-zero1",),
    ),
}
PAIRS = [
    (model, source, target)
    for model, layouts in LAYOUTS.items()
    for source in layouts
    for target in layouts
    if source != target
]
# One of each kind of change: in dp, tp, pp, stage, offload, and in all.
CORE = {
    ("gpt2", "dp2-zero1", "dp2-zero3"),
    ("gpt2", "dp2-zero3", "tp2-zero2"),
    ("gpt2", "tp2-zero2", "pp2-zero1"),
    ("gpt2", "pp2-zero1", "dp2-zero1"),
    ("llama", "dp2-zero2", "tp2-sp-zero0"),
    ("llama", "tp2-sp-zero0", "dp2-zero2"),
}


def save_sources(rank, world_size, cells, data, root):
    """Each layout trains to SAVED and saves, and trains on; the losses of what follows."""
    outcome = {}
    for model, layout in cells:
        folder = root / model / layout
        words = ("--checkpoint.save_interval", str(SAVED))
        curve = train(
            *(rank, layout, data, folder),
            steps=SAVED + FURTHER,
            stop_after=SAVED + FURTHER,
            model=model,
            extra=words,
        )
        outcome[model, layout] = curve[SAVED:]
    return outcome


def load_pairs(rank, world_size, pairs, data, root):
    """Each pair: saves what was loaded, and trains on; (the losses, whether all bits are there)."""
    from megagpt.training.start import start

    outcome = {}
    for model, source, target in pairs:
        checkpoint = root / model / source / "checkpoints" / f"step_{SAVED:08d}"
        folder = root / model / f"{source}_to_{target}"
        extra = ("--checkpoint.load", str(checkpoint))
        arguments = (rank, target, data, folder)
        run = prepare(*arguments, steps=SAVED + FURTHER, model=model, extra=extra)
        with start(run) as loaded:
            loaded.checkpointer.save(loaded.state)
        is_equal = None
        if rank == 0:
            is_equal = same_bits(checkpoint, folder / "checkpoints" / checkpoint.name)
        curve = train(
            *arguments, steps=SAVED + FURTHER, stop_after=FURTHER, model=model, extra=extra
        )
        outcome[model, source, target] = (curve, is_equal)
        if rank == 0:
            shutil.rmtree(folder)
    return outcome


def same_bits(a, b):
    """Whether two checkpoints hold the same tensors, bit by bit, and the same state."""
    from megagpt.checkpoint.format.manifest import KINDS
    from megagpt.checkpoint.format.reader import CheckpointReader

    with CheckpointReader(a) as first, CheckpointReader(b) as second:
        one, two = first.manifest, second.manifest
        counts = ("step", "adam_step", "consumed_samples", "consumed_tokens", "learning_rate")
        return (
            one.tensors.keys() == two.tensors.keys()
            and all(getattr(one.state, key) == getattr(two.state, key) for key in counts)
            and all(
                np.array_equal(
                    first.tensor(name, kind).view(np.int32),
                    second.tensor(name, kind).view(np.int32),
                )
                for name in one.tensors
                for kind in KINDS
            )
        )


def by_world_size(cells, layout_of):
    sizes = sorted({Layout.parse(layout_of(cell)).world_size for cell in cells})
    return {n: [c for c in cells if Layout.parse(layout_of(c)).world_size == n] for n in sizes}


def run_pairs(pairs, root):
    data = prepare_data(root)
    sources = sorted({(model, source) for model, source, _ in pairs})
    references, outcome = {}, {}
    for size, cells in by_world_size(sources, lambda cell: cell[1]).items():
        references |= run_distributed(save_sources, size, cells, data, root, timeout_seconds=300)[0]
    for size, cells in by_world_size(pairs, lambda cell: cell[2]).items():
        outcome |= run_distributed(load_pairs, size, cells, data, root, timeout_seconds=900)[0]
    return references, outcome


def assert_goes_on(results, pair):
    references, outcome = results
    model, source, _ = pair
    expected = np.array(references[model, source])
    curve, is_equal = outcome[pair]
    difference = np.abs(np.array(curve) - expected) / np.abs(expected)
    assert len(curve) == FURTHER
    assert difference[0, 0] <= FIRST_LOSS
    assert difference[:, 0].max() <= LOSS
    assert difference[:, 1].max() <= GRAD_NORM
    assert is_equal


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return run_pairs(sorted(CORE), tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("pair", sorted(CORE), ids="-to-".join)
def test_another_layout_goes_on(core, pair):
    assert_goes_on(core, pair)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return run_pairs(
        [pair for pair in PAIRS if pair not in CORE], tmp_path_factory.mktemp("all_pairs")
    )


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in PAIRS if p not in CORE], ids="-to-".join)
def test_every_layout_goes_on_from_every_other(everything, pair):
    assert_goes_on(everything, pair)
