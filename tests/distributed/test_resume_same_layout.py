"""The same layout, killed and resumed: every later loss and the weights to the last bit.

Three sets of processes: one trains straight on; one saves at half way, trains a little further and
kills itself; one resumes. A new process matters, for Adam's CPU kernels keep state of their own.
"""

import hashlib
from collections import Counter
from contextlib import contextmanager

import pytest
from resume_cells import kill_self, prepare_data, train

from megagpt.config.layout import Layout
from megagpt.operations.prebuild import async_io_problem
from megagpt.testing.distributed import run_distributed

STEPS, SAVED = 12, 6
DROPOUT = ("--model.dropout", "0.1")
# layout: model, precision, further settings; 2 or 4 micro-batches a step each
CELLS = {
    "dp2-zero0": ("gpt2", "fp32", DROPOUT),
    "dp2-zero1": ("gpt2", "bf16", DROPOUT),
    "dp2-zero2": ("llama", "fp32", ()),
    "dp2-zero3": ("gpt2", "bf16", DROPOUT),
    "tp2-zero0": ("llama", "fp32", DROPOUT),
    "tp2-zero3": ("gpt2", "fp32", ()),
    "pp2-zero0": ("gpt2", "fp32", DROPOUT),
    "pp2-zero1": ("gpt2", "bf16", DROPOUT),
}
SLOW_CELLS = {
    "dp2-zero1-offload_optimizer_cpu": ("gpt2", "fp32", DROPOUT),
    "dp2-zero2-offload_optimizer_cpu": ("gpt2", "bf16", ()),
    "dp2-zero3-offload_cpu": ("llama", "bf16", DROPOUT),
    "dp2-zero3-offload_optimizer_nvme": ("gpt2", "fp32", DROPOUT),
    "dp2-zero3-offload_nvme": ("gpt2", "bf16", ()),
    "pp2-zero1-offload_optimizer_cpu": ("gpt2", "bf16", ()),
    "tp2-sp-dp2-zero0": ("gpt2", "fp32", ()),
    "tp2-dp2-zero1": ("gpt2", "bf16", DROPOUT),
    "tp2-dp2-zero2": ("gpt2", "fp32", DROPOUT),
    "tp2-dp2-zero3": ("llama", "bf16", DROPOUT),
    "pp2-dp2-zero1": ("llama", "fp32", DROPOUT),
    "tp2-pp2-zero1": ("gpt2", "bf16", ()),
}


def digest(checkpoint_root):
    from megagpt.checkpoint.weights import load_weights

    sha256 = hashlib.sha256()
    for name, weight in sorted(load_weights(checkpoint_root)[1].items()):
        sha256.update(name.encode() + weight.numpy().tobytes())
    return sha256.hexdigest()


def options(cell, *words):
    model, precision, extra = cell
    return {"model": model, "precision": precision, "extra": (*extra, *words)}


def straight(rank, world_size, cells, data, root):
    outcome = {}
    for layout, cell in cells.items():
        folder = root / f"{layout}_straight"
        outcome[layout] = train(rank, layout, data, folder, steps=STEPS, **options(cell))
        outcome[layout, "weights"] = digest(folder)
    return outcome


def killed(rank, world_size, cells, data, root):
    for layout, cell in cells.items():
        words = ("--checkpoint.save_interval", str(SAVED))
        train(
            *(rank, layout, data, root / layout),
            steps=STEPS,
            stop_after=SAVED + 2,
            **options(cell, *words),
        )
    kill_self()


def resumed(rank, world_size, cells, data, root):
    outcome = {}
    for layout, cell in cells.items():
        folder = root / layout
        words = ("--checkpoint.load", "auto")
        outcome[layout] = train(rank, layout, data, folder, steps=STEPS, **options(cell, *words))
        outcome[layout, "weights"] = digest(folder)
    return outcome


def run_cells(cells, root):
    data = prepare_data(root)
    outcome = {}
    for world_size in sorted({Layout.parse(layout).world_size for layout in cells}):
        chosen = {k: v for k, v in cells.items() if Layout.parse(k).world_size == world_size}
        arguments = (world_size, chosen, data, root)
        before = run_distributed(straight, *arguments, timeout_seconds=400)[0]
        with pytest.raises(RuntimeError, match="died, exit -9"):
            run_distributed(killed, *arguments, timeout_seconds=400)
        after = run_distributed(resumed, *arguments, timeout_seconds=400)[0]
        for layout in chosen:
            outcome[layout] = (before, after)
    return outcome


def assert_bit_equal(outcome, layout):
    before, after = outcome[layout]
    assert len(before[layout]) == STEPS
    assert after[layout] == before[layout][SAVED:]  # floats, compared exactly
    assert after[layout, "weights"] == before[layout, "weights"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_cells(CELLS, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("layout", CELLS)
def test_killed_and_resumed_equals_a_straight_run_to_the_last_bit(outcome, layout):
    assert_bit_equal(outcome, layout)


def failing_save(rank, world_size, data, root):
    """Each of two ranks fails once, while a unit is brought in from NVMe; training goes on."""
    from megagpt.checkpoint.format.shard_file import ShardWriter
    from megagpt.checkpoint.saver import Checkpointer, SaveFailed
    from megagpt.checkpoint.state.optimizer_state import _Zero3State

    layout, every = "dp2-zero3-offload_optimizer_nvme", ("--checkpoint.save_interval", "1")
    outcome = [train(rank, layout, data, root / "straight", steps=5, extra=every)]
    write, writes = ShardWriter.write, Counter()

    def fail_once(writer, values):
        step = writer.path.parent.name.removeprefix(".staging_")
        writes[step] += 1
        if step == f"step_{2 + rank:08d}" and writes[step] == 4:
            raise OSError(5, "Input/output error")
        write(writer, values)

    unit, save, brought_in, left_in = _Zero3State.unit, Checkpointer.save, [], []

    @contextmanager
    def watched_unit(state, number, *, writes):
        with unit(state, number, writes=writes) as ranges:
            brought_in.append(number)
            try:
                yield ranges
            finally:
                brought_in.remove(number)

    def watched_save(checkpointer, state):
        try:
            save(checkpointer, state)
        except SaveFailed:
            left_in.append(list(brought_in))
            raise

    ShardWriter.write, _Zero3State.unit = fail_once, watched_unit
    Checkpointer.save = watched_save
    every = (*every, "--checkpoint.on_save_error", "continue")
    outcome.append(train(rank, layout, data, root / "failing", steps=5, extra=every))
    assert writes["step_00000001"] > 4 == writes[f"step_{2 + rank:08d}"]
    assert left_in == [[], []]
    return outcome, sorted(path.name for path in (root / "failing/checkpoints").iterdir())


def test_save_that_fails_leaves_state_on_nvme_in_order(tmp_path, async_io):
    outcomes = run_distributed(failing_save, 2, prepare_data(tmp_path), tmp_path)
    for (straight_curve, curve), saved in outcomes:
        assert len(curve) == 5 and curve == straight_curve
        assert saved == [".owner", "latest", "step_00000001", "step_00000004", "step_00000005"]


@pytest.fixture(scope="module")
def slow_outcome(tmp_path_factory):
    cells = {k: v for k, v in SLOW_CELLS.items() if "nvme" not in k or not async_io_problem()}
    return run_cells(cells, tmp_path_factory.mktemp("resume_slow"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_CELLS)
def test_further_layouts_killed_and_resumed_equal_a_straight_run(slow_outcome, layout, request):
    if "nvme" in layout:
        request.getfixturevalue("async_io")
    assert_bit_equal(slow_outcome, layout)
