"""What is decided of a run before its ranks meet; of the first part, without any data."""

import builtins
import dataclasses
from pathlib import Path

import pytest

from megagpt.checkpoint.format.manifest import Layout
from megagpt.config.command_line import parse_config
from megagpt.testing.corpus import byte_corpus
from megagpt.training.run import prepare_run, resolve_run

ZERO2 = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    return byte_corpus(directory, [f"document {i} of some words" for i in range(30)])


def resolve(words, *, ds_config=ZERO2, world_size=1):
    config, _, sources = parse_config(words)
    return resolve_run(config, ds_config, sources=sources, world_size=world_size, device="cpu")


def prepare(data, output_dir, *words):
    arguments = [
        *("--data.path", str(data), "--output_dir", str(output_dir)),
        *"--model.seq_length 16 --training.train_steps 5 --training.precision fp32".split(),
        *words,
    ]
    config, ds_config, sources = parse_config(arguments)
    resolved = resolve_run(config, ds_config, sources=sources, world_size=1, device="cpu")
    return prepare_run(resolved, rank=0)


def test_the_first_part_needs_no_data_and_opens_no_file(tmp_path, monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"opened {arguments[0]}")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    run = tmp_path / "run"
    words = ["--parallel.tensor_parallel_size", "2", "--batch.micro_batch_size", "2"]
    resolved = resolve([*words, "--output_dir", str(run)], world_size=8)
    assert resolved.layout == Layout(8, 2, 1, zero_stage=2, offload="cpu")
    assert resolved.topology.data_parallel_size == 4
    assert resolved.ds_config.values["gradient_accumulation_steps"] == 4
    assert resolved.config.model.vocab_size is None
    rows = [line.split() for line in resolved.table().splitlines()]
    assert ["parallel.tensor_parallel_size", "2", "flag", "--parallel.tensor_parallel_size"] in rows
    assert ["ds_config.gradient_accumulation_steps", "4", "derived"] in rows
    assert not run.exists()


def test_the_first_part_refuses_all_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="train_batch_size=7 conflicts .* num_layers"):
        resolve(
            ["--parallel.pipeline_parallel_size", "4", "--model.num_layers", "2"],
            ds_config={"zero_optimization": {"stage": 1}, "train_batch_size": 7},
            world_size=4,
        )


def test_a_fresh_run_takes_its_vocabulary_and_its_end_of_document_from_the_data(data, tmp_path):
    run = prepare(data, tmp_path / "run")
    assert run.config.model.vocab_size == 257 and run.end_of_document == 256
    assert ["model.vocab_size", "257", "derived"] in [
        line.split() for line in run.resolved.table().splitlines()
    ]
    assert (run.state.step, run.load_path) == (0, None)
    assert run.state.config == run.config and run.state.tokenizer_sha256
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.rank = 1


def test_a_vocabulary_that_the_tokenizer_overflows_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="model.vocab_size=256 is smaller than the 257"):
        prepare(data, tmp_path / "run", "--model.vocab_size", "256")
    assert not (tmp_path / "run").exists()
    assert prepare(data, tmp_path / "run", "--model.vocab_size", "300").config.model == (
        dataclasses.replace(prepare(data, tmp_path / "run").config.model, vocab_size=300)
    )


def test_a_pair_without_a_manifest_needs_the_vocabulary(data, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"plain{suffix}").write_bytes(Path(f"{data}{suffix}").read_bytes())
    plain = tmp_path / "plain"
    with pytest.raises(ValueError, match=r"no manifest .* give --model\.vocab_size"):
        prepare(plain, tmp_path / "run")
    run = prepare(plain, tmp_path / "run", "--model.vocab_size", "257")
    assert run.end_of_document is None and run.state.tokenizer_sha256 is None
    with pytest.raises(ValueError, match=r"data\.eod_mask_loss=true needs"):
        prepare(
            plain, tmp_path / "run", "--model.vocab_size", "257", "--data.eod_mask_loss", "true"
        )
