"""What a run meets outside of its settings: its folder, its data, a signal in a validation."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.config.command_line import parse_config
from megagpt.config.schema import Config
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.inference.load import open_tokenizer
from megagpt.parallel.shared_memory import remove_abandoned
from megagpt.training.pretrain import EXIT_REQUEUE
from megagpt.training.run import prepare_run, resolve_run

INPUTS = Path(__file__).parent / "inputs"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A megabyte of words, nearly all of it for validation: minutes of it."""
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(1).choices(["one", "two", "three", "four"], k=250_000)
    (folder / "a.jsonl").write_text(
        "".join(f'{{"text": "{" ".join(words[i : i + 500])}"}}\n' for i in range(0, 250_000, 500))
    )
    preprocess([folder / "a.jsonl"], folder / "a", tokenizer_path="byte")
    return folder / "a"


def prepared(*arguments: object):
    config, ds_config, sources = parse_config(
        ["--config", str(INPUTS / "tiny.yaml"), *map(str, arguments)]
    )
    resolved = resolve_run(config, ds_config, sources=sources, world_size=1, device="cpu")
    return prepare_run(resolved, rank=0)


def written_by_a_run(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_whatever_is_in_the_way_of_a_run_is_told_before_it_starts(
    data: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    command = [sys.executable, "-m", "megagpt", "train", "--config", INPUTS / "tiny.yaml"]
    command += ["--data.path", data, "--output_dir", whole, "--training.train_steps", 3]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = written_by_a_run(whole)
    assert {"checkpoints", "tensorboard", "resolved_config.yaml"} <= set(names)
    for name in names:
        folder = tmp_path / f"blocked by {name}"
        folder.mkdir()
        if (whole / name).is_dir():
            (folder / name).touch()
        else:
            (folder / name).mkdir()
        with pytest.raises(ValueError, match="is in the way of the run's") as error:
            prepared("--data.path", data, "--output_dir", folder)
        assert str(folder / name) in str(error.value)


def test_a_fault_of_the_settings_alone_names_no_file(data: Path) -> None:
    with pytest.raises(ValueError) as error:
        prepared("--data.path", data, "--batch.global_batch_size", 3)
    assert str(error.value).startswith("global_batch_size=3 is not divisible")


def test_a_constant_schedule_has_no_decay_to_fit_into() -> None:
    long = ["--optimizer.warmup_steps=900"]
    assert parse_config([*long, "--optimizer.schedule=constant"])[0].optimizer.warmup_steps == 900
    for schedule in ("cosine", "linear", "wsd"):
        with pytest.raises(ValueError, match="leaves nothing of decay_steps"):
            parse_config([*long, f"--optimizer.schedule={schedule}"])


def test_a_model_without_data_is_asked_for_its_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"names no data and no tokenizer; give --tokenizer PATH"):
        open_tokenizer(Config(), None)


def test_shared_memory_that_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    user, old = os.getuid(), time.time() - 3600
    names = [f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_1_{i}" for uid in (user, user + 1)
             for i in range(3)]  # fmt: skip
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / names[1])  # another run's that begins just now
    with (tmp_path / names[2]).open("r+b") as file, mmap.mmap(file.fileno(), 0):
        removed = remove_abandoned(tmp_path)
    assert removed == [tmp_path / names[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_signal_to_one_rank_ends_a_long_validation(data: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megagpt", "train", "--config", str(INPUTS / "tiny.yaml")]
    command += [f"--data.path={data}", f"--output_dir={tmp_path / 'run'}", "--data.split=1,99,0"]
    command += ["--batch.micro_batch_size=1", "--training.eval_interval=1"]
    command += ["--training.eval_samples=1000000"]
    ranks = []
    try:
        for rank in range(2):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = os.environ | {k: str(v) for k, v in world.items()}
            with (tmp_path / f"{rank}.log").open("w") as log:
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment | {"MASTER_ADDR": "127.0.0.1"},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        log = tmp_path / "0.log"
        deadline = time.monotonic() + 120
        while "validating on valid: " not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert all(process.poll() is None for process in ranks), log.read_text()
            time.sleep(0.2)
        # Mapped by both and named by nothing: whatever ends them, nothing is left.
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
        ranks[1].send_signal(signal.SIGTERM)
        told = time.monotonic()
        codes = [process.wait(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    text = log.read_text()
    assert codes == [EXIT_REQUEUE] * 2, text
    assert time.monotonic() - told < 30
    assert "validation of valid left off: a signal to stop was received" in text
    assert "stopping at step 2: a signal to stop was received" in text
