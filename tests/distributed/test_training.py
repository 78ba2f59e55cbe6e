"""The whole trainer on two gloo ranks: every ZeRO stage and offload agrees, and resume is exact.

The ranks start once and run all cells; each cell is a real run with its own folder.
"""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent))
from training_cells import ROOT, STEPS, prepare_data, train  # noqa: E402

from megagpt.operations.prebuild import async_io_problem
from megagpt.testing.distributed import run_distributed

# Every file of ds_configs/
FP32_CELLS = [
    *("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
    *("zero3_nvme", "pipeline"),
]
BF16_CELLS = FP32_CELLS[1:]
TP = ("--parallel.tensor_parallel_size", "2")
PP = ("--parallel.pipeline_parallel_size", "2")
# DATA and OTHER stand for the fixture's two pairs.
BLEND = ("--data.path", "{DATA: 0.7, OTHER: 0.3}", "--data.valid_sets", "{other: OTHER}")
# Of the order of data; test_resume_same_layout.py has the layouts.
RESUME_CELLS = {
    "blend/fp32": ("zero2", "fp32", BLEND),
    "megatron/fp32": ("zero1", "fp32", (*BLEND, "--data.order", "megatron")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("data"))


def agreement_cells(rank, world_size, data, root):
    curves = {}
    for precision, cells in (("fp32", FP32_CELLS), ("bf16", BF16_CELLS)):
        for zero in cells:
            if zero == "zero3_nvme" and async_io_problem():
                continue
            folder = Path(root) / f"{precision}_{zero}"
            extra = PP if zero == "pipeline" else ()
            curves[f"{precision}/{zero}"] = train(
                rank, world_size, data, folder, zero, precision, extra=extra
            )
    return curves


@pytest.fixture(scope="module")
def curves(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    results = run_distributed(agreement_cells, 2, str(data), str(root), timeout_seconds=400)
    assert results[0] == results[1], "ranks report different figures for the same step"
    return results[0] | {"root": root}


def largest_difference(a, b, column):
    return max(abs(x[column] - y[column]) / abs(y[column]) for x, y in zip(a, b, strict=True))


def test_every_shipped_json_is_trained():
    assert set(FP32_CELLS) == {path.stem for path in (ROOT / "ds_configs").glob("*.json")}


@pytest.mark.parametrize("zero", FP32_CELLS[1:])
def test_fp32_losses_of_every_stage_and_offload_agree(curves, zero, request):
    if zero == "zero3_nvme":
        request.getfixturevalue("async_io")
    a, b = curves[f"fp32/{zero}"], curves["fp32/zero0"]
    assert len(a) == STEPS
    assert largest_difference(a, b, 0) < 1e-5
    assert largest_difference(a, b, 1) < 1e-4


@pytest.mark.parametrize("zero", BF16_CELLS)
def test_bf16_losses_of_every_stage_and_offload_agree(curves, zero, request):
    # A bf16 weight is rounded by 2^-9 = 2e-3; docs/deepspeed.md has the figure found, 1e-5.
    if zero == "zero3_nvme":
        request.getfixturevalue("async_io")
    a, b = curves[f"bf16/{zero}"], curves["bf16/zero1"]
    assert largest_difference(a, b, 0) < 1e-4
    assert largest_difference(a, b, 1) < 1e-3


def test_the_model_learns_and_clipping_is_active(curves):
    curve = curves["fp32/zero0"]
    assert curve[-1][0] < curve[0][0] - 0.3
    assert max(norm for _, norm in curve) > 1.0  # above clip_grad in some step
    assert abs(curve[0][0] - math.log(257)) < 0.2  # fresh weights know nothing


def test_a_run_folder_holds_what_the_docs_say(curves):
    folder = curves["root"] / "fp32_zero1"
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoints", "tensorboard", "resolved_config.yaml", "resolved_config.txt"} <= names
    assert {"resolved_ds_config.json", "training_summary.json"} <= names
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["step"] == STEPS and summary["validation_loss"] > 0
    steps = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert steps == [".owner", "latest", f"step_{STEPS:08d}"]


def weights_sha256(weights):
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def resume_cells(rank, world_size, data, root):
    from megagpt.checkpoint.weights import load_weights

    outcome = {}
    other = str(Path(data).parent / "other" / Path(data).name)
    for cell, (zero, precision, words) in RESUME_CELLS.items():
        digests, runs = [], []
        extra = [word.replace("DATA", data).replace("OTHER", other) for word in words]
        for name, parts in (("straight", [None]), ("resumed", [6, None])):
            folder = Path(root) / f"{cell.replace('/', '_')}_{name}"
            curve = []
            for part, exit_step in enumerate(parts):
                load = "auto" if part else "none"
                curve += train(
                    *(rank, world_size, data, folder, zero, precision, 12, exit_step, load, extra)
                )
            runs.append(curve)
            digests.append(weights_sha256(load_weights(folder)[1]))
        outcome[cell] = (*runs, *digests)
    return outcome


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    results = run_distributed(resume_cells, 2, str(data), str(root), timeout_seconds=400)
    return results[0] | {"root": root}


@pytest.mark.parametrize("cell", RESUME_CELLS)
def test_stop_and_resume_equals_a_straight_run_to_the_last_bit(resumed, cell):
    straight, resumed_curve, weights, resumed_weights = resumed[cell]
    assert len(straight) == 12
    assert resumed_curve == straight  # floats compared exactly, gradient norms too
    assert resumed_weights == weights


def test_a_blended_run_shows_each_validation_set_and_how_long_it_waits_for_data(resumed):
    events = EventAccumulator(str(resumed["root"] / "blend_fp32_straight" / "tensorboard"))
    events.Reload()
    losses = {
        name: [point.value for point in events.Scalars(f"lm loss validation{name}")]
        for name in ("", "-other")
    }
    assert len(losses[""]) == len(losses["-other"]) == 2 and losses[""] != losses["-other"]
    waits = [point.value for point in events.Scalars("data-wait-share")]
    assert len(waits) == 12 and all(0 <= wait < 1 for wait in waits)


def stop_cells(rank, world_size, data, root):
    def cell(name, *extra):
        return len(
            train(rank, world_size, data, Path(root) / name, "zero1", "fp32", 12, extra=extra)
        )

    steps = {
        # 8 samples of 48 tokens a step: the third one reaches 1,000
        "tokens": cell("tokens", "--training.train_tokens", "1000"),
        "time": cell("time", "--training.exit_duration_seconds", "0.001"),
    }
    errors = {}
    for name, extra in (
        ("shape", ("--checkpoint.load", str(Path(root) / "time"), "--model.hidden_size", "64")),
        ("again", ()),
    ):
        try:
            cell("tokens" if name == "again" else "other", *extra)
        except ValueError as error:
            errors[name] = str(error)
    return steps, errors


def test_runs_stop_by_tokens_and_time_and_refuse_another_shape_or_a_used_folder(data, tmp_path):
    (steps, errors), *_ = run_distributed(stop_cells, 2, str(data), str(tmp_path))
    assert steps == {"tokens": 3, "time": 1}
    assert "model.hidden_size: saved 32, asked 64" in errors["shape"]
    assert "already holds checkpoints" in errors["again"] and "auto" in errors["again"]
    assert not (tmp_path / "other").exists()


def failing_save_cell(rank, world_size, data, root):
    from megagpt.checkpoint.format.shard_file import ShardWriter

    close = ShardWriter.close

    def fail_at_the_fourth_step(writer):
        if rank == 1 and "step_00000004" in str(writer.path):
            raise OSError(28, "No space left on device")
        return close(writer)

    ShardWriter.close = fail_at_the_fourth_step
    outcome = {}
    for policy, is_async in (("stop", "false"), ("continue", "false"), ("continue", "true")):
        folder = Path(root) / f"{policy}_{is_async}"
        extra = (
            *("--checkpoint.save_interval", "2", "--checkpoint.on_save_error", policy),
            *("--checkpoint.async_save", is_async),
        )
        try:
            outcome[folder.name] = len(
                train(rank, world_size, data, folder, "zero2", "fp32", 8, extra=extra)
            )
        except OSError as error:
            outcome[folder.name] = str(error)
    return outcome


def test_a_rank_that_cannot_write_fails_the_save_on_every_rank_and_harms_nothing(data, tmp_path):
    outcome, other = run_distributed(failing_save_cell, 2, str(data), str(tmp_path))
    assert outcome == other
    assert "rank 1" in outcome["stop_false"] and "No space left" in outcome["stop_false"]
    assert outcome["continue_false"] == outcome["continue_true"] == 8  # steps trained

    def left(name):
        return sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir())

    assert left("stop_false") == [".owner", "latest", "step_00000002"]
    saved = [".owner", "latest", "step_00000002", "step_00000006", "step_00000008"]
    assert left("continue_false") == left("continue_true") == saved


def disagreeing_load_cell(rank, world_size, data, root):
    """Resumes in which rank 1 meets a fault of ours, or reads another manifest than rank 0."""
    from megagpt.checkpoint import loader
    from megagpt.checkpoint.format import reader

    folder, outcome = Path(root) / "run", {}
    arguments = (rank, world_size, data, folder, "zero2", "fp32", 8)
    train(*arguments, exit_step=2, extra=("--checkpoint.save_interval", "1"))
    fill, read_manifest = loader._fill, reader.read_manifest

    def fail(*_):
        raise RuntimeError("a fault of ours")

    def read_another(directory):
        return dataclasses.replace(read_manifest(directory), sha256="0" * 64)

    for name, owner, attribute, replacement in (
        ("fault", loader, "_fill", fail),
        ("stale", reader, "read_manifest", read_another),
    ):
        original = getattr(owner, attribute)
        if rank == 1:
            setattr(owner, attribute, replacement)
        try:
            train(*arguments, load="auto")
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        setattr(owner, attribute, original)
    assert (fill, read_manifest) == (loader._fill, reader.read_manifest)
    outcome["after"] = len(train(*arguments, load="auto"))
    return outcome


def test_a_resume_in_which_one_rank_fails_ends_on_every_rank(data, tmp_path):
    outcomes = run_distributed(disagreeing_load_cell, 2, str(data), str(tmp_path))
    refused = "CheckpointRefused: rank 1: "
    assert outcomes[0]["fault"].startswith(f"{refused}RuntimeError: a fault of ours; ")
    assert outcomes[1]["fault"] == "RuntimeError: a fault of ours"
    for outcome in outcomes:
        assert outcome["stale"].startswith(refused)
        assert "is not the one that rank 0 finds there" in outcome["stale"]
        assert outcome["after"] == 6  # of 8 steps
