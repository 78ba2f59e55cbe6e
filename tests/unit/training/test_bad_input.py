"""What a user can get wrong: one line with value, rule and remedy, non-zero, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.config.command import run_command
from megagpt.training.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(20)]
    (directory / "text.jsonl").write_text("".join(lines))
    preprocess(directory / "text.jsonl", directory / "text")
    return directory / "text"


def preprocess(source, prefix):
    done = subprocess.run(
        [sys.executable, "-m", "megagpt", "preprocess", "--input", str(source)]
        + ["--output_prefix", str(prefix), "--tokenizer", "byte"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done


def attempt(arguments, capsys, monkeypatch):
    """Runs the command in this process; returns its exit code and the lines of stderr."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    code = run_command(pretrain)
    return code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def without_manifest(tmp_path, data):
    """The pair as Megatron would have made it."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"plain{suffix}").write_bytes(Path(f"{data}{suffix}").read_bytes())
    return tmp_path / "plain"


def cases(tmp_path, data):
    """Name -> (arguments, words that the one line must hold)."""
    base = ["--data.path", str(data), "--output_dir", str(tmp_path / "run")]
    zero3 = ["--ds_config", str(ROOT / "ds_configs/zero3.json")]
    zero1 = ["--ds_config", str(ROOT / "ds_configs/zero1.json")]
    return {
        "missing data": (
            ["--data.path", str(tmp_path / "nothing"), *base[2:], *zero3],
            ["nothing", "megagpt preprocess"],
        ),
        "corpus shorter than one sequence": (
            [*base, *zero3, "--model.seq_length", "100000", "--data.split", "1,0,0"],
            ["100000", "seq_length"],
        ),
        "heads not divisible by tp": (
            [*base, *zero3, "--parallel.tensor_parallel_size", "4", "--model.num_attention_heads"]
            + ["6"],
            ["num_attention_heads=6", "tensor_parallel_size=4", "choose"],
        ),
        "unknown key in YAML": (
            [*base, *zero3, "--config", write(tmp_path / "run.yaml", "model: {hiden_size: 64}\n")],
            ["hiden_size", "run.yaml", "model.hidden_size"],
        ),
        "unknown flag": (
            [*base, *zero3, "--model.hiden_size", "64"],
            ["hiden_size", "model.hidden_size"],
        ),
        "unknown key in JSON": (
            [*base, "--ds_config", write(tmp_path / "ds.json", {"zero_optimisation": {}})],
            ["zero_optimisation", "ds.json", "zero_optimization"],
        ),
        "batch that does not multiply out": (
            [*base, "--training.precision", "fp32", "--batch.global_batch_size", "8"]
            + ["--batch.micro_batch_size", "4", "--ds_config"]
            + [write(tmp_path / "batch.json", {"train_batch_size": 7})],
            ["train_batch_size", "7", "8"],
        ),
        "fp16 on CPU": ([*base, *zero1, "--training.precision", "fp16"], ["fp16", "bf16"]),
        "bf16 with ZeRO-0": (
            [*base, "--ds_config", str(ROOT / "ds_configs/zero0.json")],
            ["bf16", "stage", "1"],
        ),
        "resume from an empty folder": (
            [*base, *zero3, "--checkpoint.load", "auto"],
            ["holds no complete checkpoint", "--checkpoint.load none"],
        ),
        "unwritable output": (
            [*base[:2], *zero3, "--output_dir", "/dev/null/run"],
            ["/dev/null/run", "--output_dir"],
        ),
        "ranks that the degrees do not divide": (
            [*base, *zero3, "--parallel.tensor_parallel_size", "2"],
            ["world size 1", "tensor_parallel_size=2", "multiple"],
        ),
        "masking without a manifest": (
            [*base[2:], *zero1, "--data.path", str(without_manifest(tmp_path, data))]
            + ["--data.document_masking", "true", "--model.vocab_size", "257"],
            ["data.document_masking=true", "manifest", "megagpt preprocess"],
        ),
        "no data named": (
            ["--preset", "gpt2-124m", *zero3],
            ["--data.path", "make demo"],
        ),
    }


CASES = [
    "missing data", "corpus shorter than one sequence", "heads not divisible by tp",
    "unknown key in YAML", "unknown flag", "unknown key in JSON",
    "batch that does not multiply out", "fp16 on CPU", "bf16 with ZeRO-0",
    "resume from an empty folder", "unwritable output", "no data named",
    "ranks that the degrees do not divide", "masking without a manifest",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_with_value_rule_and_remedy(name, tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    arguments, words = cases(tmp_path, data)[name]
    code, lines = attempt(arguments, capsys, monkeypatch)
    assert code not in (0, None)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]
    assert not (tmp_path / "run").exists()


def test_an_empty_text_file_is_named_and_leaves_no_pair(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    done = preprocess(empty, tmp_path / "out")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "empty.txt" in errors[0]
    assert not list(tmp_path.glob("out*"))
