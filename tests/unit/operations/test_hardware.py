"""A GPU that does not start is told of; a CPU run touches none."""

import os
import platform
import socket
import subprocess
import sys

import pytest
import torch

from megagpt.operations.hardware import device_name, share_cores, training_device


@pytest.fixture
def gpus(monkeypatch):
    """A torch that is built for GPUs, on a host with so many that start."""

    def build(number):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)

    return build


def test_a_cpu_build_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    environment = {}
    assert training_device(environment) == "cpu"
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_a_gpu_that_does_not_start_is_refused_by_host(gpus):
    gpus(0)
    with pytest.raises(ValueError, match=f"host {socket.gethostname()} has no GPU that starts"):
        training_device({})
    assert training_device({"DS_ACCELERATOR": "cpu"}) == "cpu"  # asked for


@pytest.mark.parametrize(("local_rank", "is_there"), [("3", True), ("4", False)])
def test_a_rank_without_a_gpu_is_refused_by_host(gpus, local_rank, is_there):
    gpus(4)
    environment = {"LOCAL_RANK": local_rank}
    if is_there:
        assert training_device(environment) == "cuda"
        assert environment["DS_ACCELERATOR"] == "cuda"
    else:
        with pytest.raises(ValueError, match=r"has 4 GPUs and was given rank 4 .*at most 4"):
            training_device(environment)


@pytest.mark.parametrize("asked", ["cuda", "xpu"])
def test_an_accelerator_that_torch_was_not_built_for_is_refused(monkeypatch, asked):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=f"DS_ACCELERATOR={asked}"):
        training_device({"DS_ACCELERATOR": asked})


def test_the_cpu_has_a_name():
    assert device_name(torch.device("cpu")).startswith("CPU (")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"LOCAL_SIZE": "1"}, None),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "7"}, None),
        ({"LOCAL_SIZE": "3"}, 4),
        ({"LOCAL_WORLD_SIZE": "40"}, 1),
    ],
)
def test_ranks_of_a_host_share_its_cores(environment, threads, monkeypatch):
    told = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert share_cores(environment) == threads
    assert told == ([] if threads is None else [threads])


_NO_CUDA = """
import sys, torch
sys.argv = ["pretrain", *sys.argv[1:]]
torch.cuda.is_available = lambda: True

def refuse(name):
    def started(*arguments, **options):
        raise AssertionError(f"torch.cuda.{name} starts CUDA")
    return started

for name in ("_lazy_init", "get_rng_state", "set_rng_state", "memory_allocated", "synchronize"):
    setattr(torch.cuda, name, refuse(name))
from megagpt.commands import command
command("train")
"""


def test_a_cpu_run_on_a_host_with_gpus_starts_none_of_them(tmp_path):
    from megagpt.testing.corpus import byte_corpus

    data = byte_corpus(tmp_path, ("some words of text " * 9 for _ in range(40)))
    arguments = [
        *"--model.num_layers 1 --model.hidden_size 16 --model.num_attention_heads 2".split(),
        *"--model.seq_length 16 --batch.micro_batch_size 1 --batch.global_batch_size 2".split(),
        *"--training.train_steps 3 --training.precision fp32 --training.eval_interval 2".split(),
        *"--optimizer.warmup_steps 1 --checkpoint.async_save true".split(),
        *("--checkpoint.save_interval", "2", "--data.path", str(data), "--data.split", "8,1,1"),
        *("--output_dir", str(tmp_path / "run")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _NO_CUDA, *arguments],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: CPU (" in done.stdout


# Makes 64 MiB and frees them; tells the pages cleared in the last two rounds, and the MiB held in
# the end. In the first rounds small blocks come to lie between large ones, which do not fit again.
FAULTS = """
import resource, sys, torch
from megagpt.operations.hardware import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
counts = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
print(sum(counts[-2:]), pages * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_memory_that_is_freed_is_not_cleared_anew():
    counts, mib = {}, {}
    for how in ("given back", "kept"):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        counts[how], mib[how] = map(int, done.stdout.split())
    assert counts["kept"] < 100 < counts["given back"], counts
    assert mib["kept"] - mib["given back"] < 12 * 64, mib
