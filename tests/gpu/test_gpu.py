"""On a GPU: the cells of one rank, resume, checkpoints, generation, and the launcher itself.

With several GPUs the cells of so many ranks too, over NCCL. `make gpu-test`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import resume_cells
import suite
import test_resume_same_layout as resume
import torch
from cells import CELLS, GPU_CELLS

from megagpt.config.layout import Layout
from megagpt.inference.generate import Sampling, generate
from megagpt.inference.load import load
from megagpt.model.keyed_numbers import standard_normal
from megagpt.testing.distributed import free_port, most_ranks, run_distributed
from megagpt.testing.report import write_records

ROOT = Path(__file__).resolve().parents[2]
PARITY = suite.runnable([*CELLS, *GPU_CELLS])
# model, precision, further settings; saves are asynchronous, out of pinned memory
ASYNC = ("--checkpoint.async_save", "true")
RESUME = {
    "zero0": ("gpt2", "fp32", (*resume.DROPOUT, *ASYNC)),
    "zero1": ("llama", "bf16", ASYNC),
    "zero2": ("gpt2", "fp16", ASYNC),
    "zero3": ("llama", "bf16", (*resume.DROPOUT, *ASYNC)),
    "zero3-offload_cpu": ("gpt2", "bf16", ()),
    "dp2-zero1": ("gpt2", "bf16", ASYNC),
    "tp2-zero3": ("llama", "fp32", ASYNC),
    "pp2-zero1": ("gpt2", "bf16", ASYNC),
}
JSONS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module")
def parity():
    records = suite.run_cells(PARITY)
    write_records(ROOT / "build/gpu-parity.json", records)
    return {record["name"]: record for record in records}


@pytest.mark.parametrize("cell", PARITY, ids=lambda cell: cell.name)
def test_a_layout_gives_the_curve_of_one_process(cell, parity):
    assert parity[cell.name]["ok"], parity[cell.name]


def test_numbers_by_key_are_the_cpus_to_the_last_bit():
    box = {"rows": range(3, 300), "columns": range(1, 4_000), "width": 4_001}
    cpu, gpu = (standard_normal(7, **box, device=torch.device(d)) for d in ("cpu", "cuda"))
    assert torch.equal(gpu.cpu(), cpu)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    cells = {k: v for k, v in RESUME.items() if Layout.parse(k).world_size <= most_ranks()}
    return resume.run_cells(cells, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("layout", RESUME)
def test_killed_and_resumed_equals_a_straight_run_to_the_last_bit(layout, resumed):
    if layout not in resumed:
        pytest.skip(f"{layout} needs {Layout.parse(layout).world_size} GPUs")
    resume.assert_bit_equal(resumed, layout)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return resume_cells.prepare_data(tmp_path_factory.mktemp("data"))


def overflowing(rank, world_size, data, root):
    """fp16 from a scale at which the first steps overflow; what each step gave, and the scale."""
    from megagpt.training.loop import loop
    from megagpt.training.start import start

    keys = {"fp16": {"initial_scale_power": 26, "hysteresis": 1}}
    run = resume_cells.prepare(rank, "zero2", data, root, steps=12, precision="fp16", keys=keys)
    applied, losses = [], []
    with start(run) as session:

        def on_step(result):
            applied.append(session.engine.was_step_applied())
            losses.append(result.loss)

        loop(session, on_step)
        return applied, losses, session.engine.optimizer.cur_scale


def test_fp16_lowers_its_scale_until_steps_are_applied(data, tmp_path):
    ((applied, losses, scale),) = run_distributed(overflowing, 1, data, tmp_path)
    assert not applied[0] and all(applied[-4:])
    assert scale == 2.0 ** (26 - applied.count(False))
    assert losses[-1] < losses[0] and all(loss == loss for loss in losses)


@pytest.fixture(scope="module")
def launched(data, tmp_path_factory):
    """The user's command with every JSON, side by side on the GPUs: exit code and output."""
    root = tmp_path_factory.mktemp("launched")
    command = [str(Path(sys.executable).parent / "deepspeed")]
    if not Path(command[0]).exists():
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    processes = {}
    for name in JSONS:
        arguments = [
            *("--num_gpus", "1", "--master_port", free_port()),
            *("launch/pretrain.py", "--ds_config", f"ds_configs/{name}.json"),
            *"--model.num_layers 4 --model.hidden_size 256 --model.num_attention_heads 4".split(),
            *"--model.num_kv_heads 2 --model.seq_length 256".split(),
            *"--model.position_embedding rope".split(),
            *"--model.normalization rmsnorm --model.activation swiglu --model.bias false".split(),
            *"--batch.micro_batch_size 4 --batch.global_batch_size 8".split(),
            *"--training.train_steps 30 --training.precision bf16".split(),
            *"--training.eval_interval 15 --data.document_masking true".split(),
            *("--data.path", str(data), "--data.split", "8,1,1", "--output_dir", str(root / name)),
        ]
        processes[name] = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    outputs = {name: process.communicate(timeout=400)[0] for name, process in processes.items()}
    return root, {name: (processes[name].returncode, outputs[name]) for name in JSONS}


@pytest.mark.parametrize("name", JSONS)
def test_the_launcher_trains_with_the_json(name, launched):
    root, outcomes = launched
    code, output = outcomes[name]
    assert code == 0, output[-3000:]
    assert torch.cuda.get_device_name(0) in output
    summary = json.loads((root / name / "training_summary.json").read_text())
    assert summary["step"] == 30 and summary["train_loss"] < 4


def test_all_jsons_give_the_same_losses(launched):
    root, _ = launched
    losses = [
        json.loads((root / name / "training_summary.json").read_text())["train_loss"]
        for name in JSONS
    ]
    assert max(losses) - min(losses) < 5e-3 * losses[0]  # parity's ceiling for bf16


def test_generation_on_the_gpu_is_that_of_the_cpu(launched, monkeypatch):
    root, _ = launched
    gpu = load(root / "zero1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cpu = load(root / "zero1")
    devices = [next(loaded.model.parameters()).device.type for loaded in (gpu, cpu)]
    assert devices == ["cuda", "cpu"]
    tokens = torch.tensor([list(b"Licensed under the Apache")])
    torch.testing.assert_close(
        gpu.model.logits(tokens.cuda()).cpu(), cpu.model.logits(tokens), rtol=1e-4, atol=1e-4
    )
    continued = [
        generate(
            loaded.model,
            tokens[0].tolist(),
            max_new_tokens=40,
            sampling=Sampling(temperature=0),
            eod=256,
        )
        for loaded in (gpu, cpu)
    ]
    assert continued[0] == continued[1]


def test_evaluation_on_the_gpu_gives_the_validation_of_the_run(launched, tmp_path):
    root, _ = launched
    result = tmp_path / "evaluation.json"
    subprocess.run(
        [sys.executable, "-m", "megagpt", "evaluate", "--checkpoint", str(root / "zero1")]
        + ["--split", "valid", "--json", str(result)],
        cwd=ROOT,
        check=True,
    )
    assert json.loads(result.read_text())["loss"] > 0
