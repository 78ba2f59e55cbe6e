"""`megagpt data`: each command on a real pair, and one line for what is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megagpt.config.command_line import parse_config
from megagpt.data.describe import length_histogram, locate, open_training
from megagpt.data.indexed.dataset import IndexedDataset

TEXTS = [f"Document {i} says {'so ' * (i % 5)}." for i in range(50)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    for name, texts in (("a", TEXTS), ("b", TEXTS[:20])):
        source = directory / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = run("preprocess", "--input", source, "--output_prefix", directory / name)
        assert done.returncode == 2  # no tokenizer is named
        done = run(
            *("preprocess", "--input", source, "--output_prefix", directory / name),
            *("--tokenizer", "byte"),
        )
        assert done.returncode == 0, done.stderr
    return directory


def run(verb, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "megagpt", verb, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def data(*arguments):
    done = run("data", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_options(directory):
    return [
        *("--data.path", f"{{{directory}/a: 0.75, {directory}/b: 0.25}}"),
        *("--data.split", "1", "--model.seq_length", "16", "--batch.global_batch_size", "4"),
        *("--training.train_steps", "50"),
    ]


def test_inspect_shows_counts_lengths_and_text(directory):
    shown = data("inspect", directory / "a", "--documents", 2, "--picture", directory / "a.png")
    assert "50 documents, 50 sequences" in shown
    assert repr(TEXTS[0]) in shown and repr(TEXTS[1]) in shown
    assert (directory / "a.png").read_bytes().startswith(b"\x89PNG")


def test_histogram_counts_every_document_and_token(directory):
    indexed = IndexedDataset(directory / "a")
    bins = length_histogram(indexed)
    assert sum(each.num_documents for each in bins) == 50
    assert sum(each.num_tokens for each in bins) == indexed.num_tokens
    for each in bins:
        lengths = np.diff(indexed.document_offsets())
        inside = (each.shortest <= lengths) & (lengths <= each.longest)
        assert each.num_documents == inside.sum()


def test_verify_names_the_damaged_pair(directory, tmp_path):
    assert "sound" in data("verify", directory / "a", directory / "b")
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"c{suffix}").write_bytes((directory / f"a{suffix}").read_bytes())
    content = bytearray((tmp_path / "c.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "c.bin").write_bytes(content)
    done = run("data", "verify", tmp_path / "c")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/c.bin in bytes 0 to") and "has changed" in line


def test_split_merge_and_adopt(directory, tmp_path):
    shown = data("split", directory / "a", tmp_path / "part", "--shares", "8,2")
    assert shown.splitlines() == [
        f"{tmp_path}/part_train: 40 documents, 990 tokens",
        f"{tmp_path}/part_valid: 10 documents, 250 tokens",
    ]
    data("merge", tmp_path / "whole", tmp_path / "part_train", tmp_path / "part_valid")
    assert (tmp_path / "whole.bin").read_bytes() == (directory / "a.bin").read_bytes()
    (tmp_path / "whole.manifest.json").unlink()
    assert "100% of the documents end" in data("adopt", tmp_path / "whole", "--tokenizer", "byte")


def test_blend_tells_what_each_pair_gives(directory):
    lines = data("blend", *run_options(directory)).splitlines()
    assert "weight=0.750000 samples=150 tokens=2400" in lines[0]
    assert "weight=0.250000 samples=50 tokens=800" in lines[1]


def test_locate_shows_the_tokens_that_the_step_trains_on(directory):
    config, _, _ = parse_config(run_options(directory))
    dataset = open_training(config)
    for step in (1, 17, 50):
        samples = dataset.gather(range(4 * (step - 1), 4 * step))
        pieces = list(locate(config, step))
        for row in range(4):
            own = [piece for piece in pieces if piece.row == row]
            assert np.concatenate([piece.tokens for piece in own]).tolist() == samples[row].tolist()
            for piece in own:
                document = IndexedDataset(piece.prefix).document(piece.document)
                end = piece.offset + len(piece.tokens)
                assert document[piece.offset : end].tolist() == piece.tokens.tolist()
    shown = data("locate", "--step", 2, *run_options(directory))
    assert shown.startswith("sample 4 row 0: ") and f"{directory}/a document" in shown
    done = run("data", "locate", "--step", 51, *run_options(directory))
    assert done.returncode == 1 and "step=51 is not one of the run's, 1 to 50" in done.stderr
