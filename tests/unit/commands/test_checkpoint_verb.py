"""`megagpt checkpoint`: each command on real folders, exit codes, one line for what is wrong."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megagpt.checkpoint.compare import compare_states, compare_tensors
from megagpt.checkpoint.describe import bytes_in_words, describe_run, layout_in_words
from megagpt.checkpoint.directory import complete_steps, write_latest
from megagpt.checkpoint.format.manifest import KINDS, MANIFEST_FILE, Layout, read_manifest
from megagpt.checkpoint.format.reader import CheckpointReader
from megagpt.config.schema import Config, ModelConfig, OptimizerConfig


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megagpt", "checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def tool(*arguments, code=0):
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture
def steps(tmp_path, write_checkpoint):
    """A run of four steps, of which `latest` names the last."""
    previous, line = None, ()
    for step in (10, 20, 30, 40):
        directory = write_checkpoint(
            tmp_path / "run" / "checkpoints",
            step,
            tp_size=2,
            dp_size=2,
            previous=previous,
            line=line,
        )
        previous = read_manifest(directory).sha256
        line = ((step, previous), *line)
    write_latest(directory.parent, step, previous)
    return complete_steps(directory.parent)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_inspect_of_a_run_tells_its_steps_and_what_a_resume_takes(steps):
    flip(steps[40] / MANIFEST_FILE, 500)
    checkpoints = steps[10].parent
    for name in (".staging_step_00000050", ".removed_step_00000005", "step_00000060"):
        (checkpoints / name).mkdir()
    lines = tool("inspect", checkpoints.parent).splitlines()
    assert lines[0] == f"{checkpoints}: steps: 4"
    size = sum(path.stat().st_size for path in steps[10].iterdir())
    assert lines[1] == (
        f"step       10  {bytes_in_words(size):>10}  2030-01-01T00:00:00+00:00  "
        "4 ranks dp=2 tp=2, ZeRO 1"
    )
    assert f"damaged: {steps[40]}/{MANIFEST_FILE} is damaged" in lines[4]
    assert lines[5:] == [
        "latest: names step 40, which has another manifest",
        "a resume takes: step 30",
        *map("left by a killed process: {}".format, sorted(os.listdir(checkpoints))[:2]),
        "left by a killed process: step_00000060",
    ]


def test_latest_is_told_in_words(steps):
    latest = steps[10].parent / "latest"

    def told():
        return describe_run(steps[10].parent).latest

    assert told() == "names step 40"
    write_latest(latest.parent, 50, "")
    assert told() == "names step 50, which is not there or not complete"
    latest.write_text("{")
    assert told() == "damaged"
    latest.unlink()
    assert told() == "not there"


def test_inspect_of_a_step_tells_what_it_holds(steps):
    (steps[20] / "notes.txt").write_text("mine")
    lines = tool("inspect", steps[20], "--tensors", 2, "--files", 1).splitlines()
    assert lines[0] == f"{steps[20]}: step 20, saved 2030-01-01T00:00:00+00:00"
    assert lines[1:7] == [
        *("samples: 640, tokens: 163,840", "lr: 0.25, updates of Adam: 20"),
        *("layout: 4 ranks dp=2 tp=2, ZeRO 1", "precision: bf16", "versions: megagpt 0"),
        f"parameters: {13 * 8 + 6 * 12 + 7} in 3 tensors",
    ]
    assert lines[7].startswith("size: ") and "in 8 files: weight 732 bytes, exp_avg" in lines[7]
    assert lines[8].startswith("file: optimizer-00000.safetensors, ")
    assert lines[9:] == [
        "and 7 more files; --files lists more",
        "tensor: embedding.weight [13, 8], 104 elements in 4 pieces",
        "tensor: mlp.weight [6, 12], 72 elements in 4 pieces",
        "stray: notes.txt, which nothing reads",
    ]


def test_verify_lists_all_that_is_wrong_and_fails(steps, tmp_path):
    (steps[10] / "notes.txt").write_text("mine")
    shown = tool("verify", steps[10].parent.parent)
    assert shown.count(": sound, ") == 4 and shown.count(" GB/s") == 4
    assert f"{steps[10]}: notes.txt is not of the checkpoint" in shown
    flip(steps[20] / "weights-00001.safetensors", 60)
    (steps[20] / "optimizer-00003.safetensors").unlink()
    os.truncate(steps[30] / "weights-00000.safetensors", 7)
    done = run("verify", steps[20], steps[30], steps[40])
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert errors[0] == f"error: {steps[20]}/optimizer-00003.safetensors is missing"
    assert f"error: {steps[20]}/weights-00001.safetensors is damaged: bytes 0 to " in errors[1]
    assert f"{steps[30]}/weights-00000.safetensors has 7 bytes, its manifest says" in errors[2]
    assert f"{steps[20]}: 2 problems" in done.stdout and f"{steps[40]}: sound" in done.stdout


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "prune"])
def test_folder_without_a_checkpoint_is_one_line(command, tmp_path):
    further = {"diff": [tmp_path], "prune": ["--keep_last", 1]}.get(command, [])
    done = run(command, tmp_path, *further)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} holds no complete checkpoint")


def test_diff_of_two_layouts_tells_equal_bits_and_what_else_differs(tmp_path, write_checkpoint):
    first = write_checkpoint(tmp_path / "a", 10)
    config = Config(model=ModelConfig(vocab_size=13), optimizer=OptimizerConfig(lr=0.5))
    second = write_checkpoint(tmp_path / "b", 20, tp_size=4, dp_size=2, config=config)
    lines = tool("diff", first, tmp_path / "b").splitlines()
    assert lines[:2] == [f"first: {first}", f"second: {second}"]
    assert lines[-1] == "all 9 tensors are equal, bit by bit"
    assert {
        *("state.step: 10, 20", "layout.world_size: 1, 8", "layout.tensor_parallel_size: 1, 4"),
        "config.optimizer.lr: 0.001, 0.5",
    } <= set(lines)
    assert compare_states(read_manifest(first), read_manifest(first)) == []


def test_diff_tells_by_how_much_and_heeds_the_tolerance(tmp_path, write_checkpoint, make_values):
    values = make_values()
    first = write_checkpoint(tmp_path / "a", values=values, tp_size=2)
    changed = {key: value.copy() for key, value in values.items()}
    changed["weight", "mlp.weight"][2, 5] += 0.5
    changed["weight", "mlp.weight"][5, 11] -= 0.25
    second = write_checkpoint(tmp_path / "b", values=changed, dp_size=3)
    gap = np.abs(values["weight", "mlp.weight"].astype(float) - changed["weight", "mlp.weight"])
    relative = np.linalg.norm(gap) / np.linalg.norm(values["weight", "mlp.weight"])
    lines = tool("diff", first, second, code=1).splitlines()
    assert lines[-2:] == [
        f"weight mlp.weight: largest={gap.max():.3e} relative={relative:.3e} different=2 of 72",
        "8 of 9 tensors are equal, bit by bit; all together not within the tolerance 0",
    ]
    tool("diff", first, second, "--tolerance", 0.51)
    tool("diff", first, second, "--tolerance", 0.49, code=1)
    tool("diff", first, second, "--kind", "exp_avg")
    flip(second / "weights-00000.safetensors", -1)
    assert "weights-00000.safetensors is damaged" in run("diff", first, second).stderr
    assert run("diff", first, second, "--tolerance", "nan").returncode == 2


@pytest.mark.parametrize(
    ("first", "second", "num_different", "largest"),
    [
        (0.0, -0.0, 1, 0.0),
        (np.nan, np.nan, 0, 0.0),
        (np.nan, 1.0, 1, np.inf),
        (np.inf, np.inf, 0, 0.0),
        (np.inf, -np.inf, 1, np.inf),
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 1, 2.0**-23),
    ],
)
def test_comparison_is_of_bits(
    tmp_path, write_checkpoint, make_values, first, second, num_different, largest
):
    readers = []
    for name, value in (("a", first), ("b", second)):
        values = make_values()
        values["weight", "norm.weight"][3] = value
        readers.append(CheckpointReader(write_checkpoint(tmp_path / name, values=values)))
    with readers[0], readers[1]:
        found = {each.name: each for each in compare_tensors(*readers, kinds=["weight"])}
    tensor = found.pop("norm.weight")
    assert (tensor.num_different, tensor.largest) == (num_different, largest)
    assert tensor.is_bit_equal == tensor.is_within(0) == (num_different == 0)
    assert tensor.is_within(1e-6) == (largest < 1e-6)
    assert all(each.is_bit_equal for each in found.values())


def test_tensors_of_one_only_and_of_other_shapes_are_told(tmp_path, write_checkpoint, make_values):
    values = make_values()
    first = write_checkpoint(tmp_path / "a", values=values)
    values = {key: array for key, array in values.items() if key[1] != "norm.weight"}
    for kind in KINDS:
        values[kind, "mlp.weight"] = np.zeros((12, 6), np.float32)
        values[kind, "head.weight"] = np.zeros((2, 2), np.float32)
    second = write_checkpoint(tmp_path / "b", values=values)
    lines = tool("diff", first, second, "--kind", "weight", code=1).splitlines()
    assert lines[-4:] == [
        "weight mlp.weight: shape [6, 12] against [12, 6]",
        "weight norm.weight: only in the first",
        "weight head.weight: only in the second",
        "1 of 4 tensors are equal, bit by bit; all together not within the tolerance 0",
    ]


def test_prune_removes_what_it_told_in_the_dry_run(steps):
    checkpoints = steps[10].parent
    size = sum(path.stat().st_size for step in (10, 30) for path in steps[step].iterdir())
    options = ("prune", checkpoints.parent, "--keep_last", 1, "--keep_every", 20)
    shown = tool(*options, "--dry_run")
    assert [line.split(",")[0] for line in shown.splitlines()] == [
        *(f"would remove {steps[10]}", f"would remove {steps[30]}"),
        f"would free {size:,} bytes".split(",")[0],
    ]
    assert f"would free {size:,} bytes" in shown
    assert complete_steps(checkpoints) == steps
    assert f"freed {size:,} bytes" in tool(*options)
    assert list(complete_steps(checkpoints)) == [20, 40]
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000020", "step_00000040"]
    assert "freed 0 bytes" in tool(*options)


def test_prune_keeps_the_newest_that_can_be_read(steps):
    flip(steps[40] / MANIFEST_FILE, 500)
    shown = tool("prune", steps[10].parent, "--keep_last", 1)
    assert f"{steps[40]} is damaged; it stays and does not count" in shown
    assert list(complete_steps(steps[10].parent)) == [30, 40]


def test_prune_neither_counts_nor_removes_damaged_steps(steps):
    flip(steps[30] / MANIFEST_FILE, 500)
    tool("prune", steps[10].parent, "--keep_last", 2)
    assert list(complete_steps(steps[10].parent)) == [20, 30, 40]
    tool("prune", steps[10].parent, "--keep_last", 1)
    assert list(complete_steps(steps[10].parent)) == [30, 40]


def test_prune_keeps_the_newest_of_a_run_that_has_gone_back(steps):
    write_latest(steps[10].parent, 20, read_manifest(steps[20]).sha256)
    shutil.rmtree(steps[30])  # so that nothing leads from 20 to 40
    tool("prune", steps[10].parent, "--keep_last", 1)
    assert list(complete_steps(steps[10].parent)) == [20, 40]


@pytest.mark.parametrize("options", [["--keep_last", 0], ["--keep_last", 1, "--keep_every", -1]])
def test_prune_refuses_to_keep_nothing(steps, options):
    done = run("prune", steps[10].parent, *options)
    assert done.returncode == 2 and "keep_last must be at least 1" in done.stderr
    assert complete_steps(steps[10].parent) == steps


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(1), "1 rank, ZeRO 0"),
        (Layout(8, 2, 2, 1), "8 ranks dp=2 tp=2 pp=2, ZeRO 1"),
        (Layout(4, zero_stage=3, offload="nvme"), "4 ranks dp=4, ZeRO 3, optimizer on nvme"),
    ],
)
def test_layout_in_words(layout, words):
    assert layout_in_words(layout) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (3.25e15, "3250.0 TB")],
)
def test_bytes_in_words(num_bytes, words):
    assert bytes_in_words(num_bytes) == words
