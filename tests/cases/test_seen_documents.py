"""Evaluation and generation see documents as training did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.config.schema import ModelConfig
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.inference.generate import Sampling, generate
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize

INPUTS = Path(__file__).parent / "inputs"
BF16_TOLERANCE = 4e-3
"""Of parity's bf16 cells: the run computes in bf16, evaluation in fp32."""
MASKING = ["--data.document_masking=true"]
UNSCORED = ["--data.eod_mask_loss=true"]
LLAMA = [
    *("--model.position_embedding=rope", "--model.normalization=rmsnorm"),
    *("--model.activation=swiglu", "--model.bias=false", "--model.qk_norm=true"),
    *("--model.num_kv_heads=2", "--model.tie_embeddings=false"),
]
RUNS = {
    "gpt": ([], 1e-6),
    "gpt masked": ([*MASKING, "--model.dropout=0.1"], 1e-6),
    "gpt unscored": (UNSCORED, 1e-6),
    "llama masked unscored": ([*LLAMA, *MASKING, *UNSCORED], 1e-6),
    "llama masked bf16": ([*LLAMA, *MASKING, "--training.precision=bf16"], BF16_TOLERANCE),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("documents") / "short"
    preprocess([INPUTS / "shortdocs.jsonl"], prefix, tokenizer_path="byte")
    return prefix


def megagpt(*arguments: object) -> str:
    command = [sys.executable, "-m", "megagpt", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("flags", "tolerance"), RUNS.values(), ids=RUNS.keys())
def test_evaluation_gives_the_validation_of_the_run(
    flags: list[str], tolerance: float, data: Path, tmp_path: Path
) -> None:
    run, result = tmp_path / "run", tmp_path / "result.json"
    base = ["--config", INPUTS / "tiny.yaml", "--data.path", data, "--output_dir", run]
    # Enough steps that a document's second half is known from its first.
    more = ["--training.train_steps=40", "--optimizer.lr=1e-2", "--data.split=90,10,0"]
    megagpt("train", *base, *more, *flags, "--training.eval_samples=40")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tag = next(tag for tag in events.Tags()["scalars"] if "validation" in tag and "loss" in tag)
    theirs = events.Scalars(tag)[-1].value
    evaluate = ["evaluate", "--checkpoint", run, "--json", result]
    megagpt(*evaluate, "--as_validation")
    ours = json.loads(result.read_text())
    assert ours["loss"] == pytest.approx(theirs, abs=tolerance)
    assert ours["bits_per_byte"] is None and ours["no_bits_per_byte"]
    # All of the split, in windows of its own, is about the same.
    megagpt(*evaluate, "--split", "valid", "--stride", 64)
    whole = json.loads(result.read_text())
    assert whole["loss"] == pytest.approx(theirs, rel=0.05)
    assert (whole["bits_per_byte"] is None) == (flags[-1:] == UNSCORED)


def test_generation_from_nothing_sees_no_end_of_document() -> None:
    shape = ModelConfig(
        num_layers=2,
        hidden_size=12,
        num_attention_heads=3,
        seq_length=16,
        vocab_size=20,
        init_std=0.5,
    )
    model = GPTModel(shape)
    initialize(model, shape, seed=1)
    model.requires_grad_(False).eval()
    options = dict(max_new_tokens=6, sampling=Sampling(temperature=0), eod=19)
    masked = generate(model, [], document_masking=True, **options)[0]
    assert masked[1:] == generate(model, masked[:1], **(options | {"max_new_tokens": 5}))[0]
    unmasked = generate(model, [], **options)[0]
    assert unmasked[:1] == masked[:1] and unmasked != masked


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-40, 1e-12, 1e-7])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    from megagpt.inference.generate import next_token_probabilities

    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = next_token_probabilities(logits, Sampling(temperature=temperature))
    assert found.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_is_not_finite_is_one_line(value: float, temperature: float) -> None:
    from megagpt.inference.generate import next_token_probabilities

    with pytest.raises(ValueError, match="logits that are not finite"):
        next_token_probabilities(torch.tensor([[1.0, value]]), Sampling(temperature=temperature))
