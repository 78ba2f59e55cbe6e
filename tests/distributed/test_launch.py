"""The script under its launchers: the same losses, signals to ranks, one line of error."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_cells import ROOT, prepare_data  # noqa: E402

from megagpt.testing.distributed import free_port  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("data"))


def run_script(command, cwd, **environment):
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def script_arguments(data, output_dir):
    return [
        str(ROOT / "launch/pretrain.py"), "--ds_config", str(ROOT / "ds_configs/zero3.json"),
        "--model.num_layers", "1", "--model.hidden_size", "32", "--model.num_attention_heads", "2",
        "--model.seq_length", "32", "--batch.global_batch_size", "8", "--training.train_steps", "3",
        "--training.precision", "fp32", "--data.path", str(data), "--data.split", "8,1,1",
        "--output_dir", str(output_dir),
    ]  # fmt: skip


def final_loss(output_dir):
    return json.loads((output_dir / "training_summary.json").read_text())["train_loss"]


def test_the_same_script_runs_under_python_torchrun_and_deepspeed(data, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    binaries = Path(sys.executable).parent
    launchers = {
        "python": [sys.executable],
        "torchrun": [str(binaries / "torchrun"), "--standalone", "--nproc_per_node", "2"],
        "deepspeed": [str(binaries / "deepspeed"), "--hostfile", str(hostfile)]
        + ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", free_port()],
    }
    losses = {}
    for name, command in launchers.items():
        output_dir = tmp_path / name
        done = run_script(command + script_arguments(data, output_dir), tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        losses[name] = final_loss(output_dir)
    assert losses["torchrun"] == losses["deepspeed"]
    assert math.isclose(losses["python"], losses["torchrun"], rel_tol=1e-5)


@pytest.mark.slow
def test_the_command_of_the_docs_tells_ranks_to_stop_and_not_the_launchers(data, tmp_path):
    page = (ROOT / "docs/checkpoints.md").read_text()
    pkill = shlex.split(next(line for line in page.splitlines() if line.startswith("pkill ")))
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    words = [*script_arguments(data, tmp_path / "run"), "--training.train_steps", "100000"]
    words[0] = str(Path(words[0]).relative_to(ROOT))  # as a user writes it
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            [*deepspeed, "--master_port", free_port(), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "iteration " not in log.read_text():
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        # Of this session alone, for another run may be at work on this machine.
        subprocess.run([*pkill[:1], "-s", str(launcher.pid), *pkill[1:]], check=True)
        assert launcher.wait(timeout=60) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert "a signal to stop was received" in log.read_text()
    assert (tmp_path / "run/checkpoints/latest").is_file()


def test_a_fault_of_the_user_ends_every_rank_with_one_line(data, tmp_path):
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    arguments = script_arguments(data, tmp_path / "run") + ["--checkpoint.load", "auto"]
    done = run_script([*torchrun, "--nproc_per_node", "2", *arguments], tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "holds no complete checkpoint" in lines[0]
    assert not (tmp_path / "run").exists()
