"""Text files and tokenizers as they are out there, read by every command that reads text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.load import load_tokenizer

INPUTS = Path(__file__).parent / "inputs"


def megagpt(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megagpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("log", [10, 23, 27, 28, 31])
def test_a_long_window_of_zstd_is_read(log: int, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, compression_level=3)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    text = json.dumps({"text": "a long window"}).encode()
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(packed.compress(text) + packed.flush())
    manifest = preprocess([path], tmp_path / "out", tokenizer_path="byte")
    assert manifest.num_documents == 1


def test_the_long_window_of_the_report_is_read(tmp_path: Path) -> None:
    path = INPUTS / "long28.jsonl.zst"
    assert preprocess([path], tmp_path / "out", tokenizer_path="byte").num_documents > 1


def test_a_cut_frame_is_called_damaged_and_a_foreign_window_a_limit(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes((INPUTS / "long28.jsonl.zst").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off or damaged"):
        preprocess([cut], tmp_path / "out", tokenizer_path="byte")
    # Magic number, no single segment, a window of 2^41 bytes, then nothing.
    wide = tmp_path / "wide.jsonl.zst"
    wide.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([(41 - 10) << 3]) + b"\x01\x00\x00")
    with pytest.raises(ValueError, match="needs a window of more than 2 GiB"):
        preprocess([wide], tmp_path / "out", tokenizer_path="byte")


@pytest.mark.parametrize("key", ["n", "text"])
@pytest.mark.parametrize("value", ["9" * 5000, "-" + "9" * 5000, "[" * 100_000, '{"a":' * 9_999])
def test_giants_in_a_line_have_a_place_and_can_be_skipped(
    key: str, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"})
    path.write_text(f'{good}\n{{"text": "bad", "{key}": {value}}}\n{good}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: invalid JSON") as error:
        preprocess([path], tmp_path / "out", tokenizer_path="byte")
    assert len(str(error.value)) < 400
    manifest = preprocess(
        [path], tmp_path / "out", tokenizer_path="byte", on_error="skip", largest_skipped_share=0.5
    )
    assert (manifest.num_documents, manifest.skipped) == (2, {"invalid JSON": 1})


def test_the_giant_of_the_report_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bigint\.jsonl:2: invalid JSON .* 4,300 digits"):
        preprocess([INPUTS / "bigint.jsonl"], tmp_path / "out", tokenizer_path="byte")


def test_train_tokenizer_tells_a_bad_line_as_preprocessing_does(tmp_path: Path) -> None:
    source, model = INPUTS / "badline.jsonl", tmp_path / "a.model"
    with pytest.raises(ValueError) as error:
        preprocess([source], tmp_path / "out", tokenizer_path="byte")
    training = ["tokenizer", "--input", source, "--output", model, "--vocab_size", 300]
    result = megagpt(*training)
    assert (result.returncode, result.stderr) == (1, f"error: {error.value}\n")
    assert "badline.jsonl:" in str(error.value) and not model.exists()
    result = megagpt(*training, "--on_error", "skip")
    assert result.returncode == 1 and "raise --largest_skipped_share" in result.stderr
    assert not model.exists()
    result = megagpt(*training, "--on_error", "skip", "--largest_skipped_share", "0.2")
    assert result.returncode == 0 and model.exists(), result.stderr
    assert "left out: " in result.stderr


def test_what_the_tokenizers_library_cannot_encode_has_a_place(tmp_path: Path) -> None:
    tokenizer = INPUTS / "tok_wl.json"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("hello", "hello you")))
    with pytest.raises(ValueError) as error:
        preprocess([path], tmp_path / "out", tokenizer_path=tokenizer)
    assert str(error.value).startswith(f"{path}:2: tokenizer {tokenizer} cannot encode 'hello you'")
    assert "UNK" in str(error.value) and "\n" not in str(error.value)
    preprocess(
        [path],
        tmp_path / "out",
        tokenizer_path=tokenizer,
        on_error="skip",
        largest_skipped_share=0.5,
        workers=2,
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_documents, manifest.text_bytes) == (1, 5)
    assert manifest.skipped == {"not encodable": 1}
    assert load_tokenizer(tokenizer).decode([0]) == "hello"


@pytest.mark.parametrize("verb", ["generate", "evaluate", "train", "preprocess"])
def test_arguments_that_are_not_utf_8_are_one_line(verb: str) -> None:
    result = megagpt(verb, "--prompt", b"caf\xe9".decode(errors="surrogateescape"))
    assert result.returncode == 2
    assert result.stderr == (
        "error: argument 'caf\\udce9' is not UTF-8 text; convert it, or rename the file\n"
    )


def test_a_number_of_more_than_64_bits_is_one_line() -> None:
    result = megagpt("generate", "--checkpoint", "x", "--seed", 10**30)
    assert result.returncode == 2 and "--seed=1000000" in result.stderr
    assert "does not fit into 64 bits" in result.stderr and result.stderr.count("\n") == 1


def test_an_output_that_has_not_the_characters_shows_their_codes() -> None:
    result = megagpt(
        *["data", "inspect", "größe"],
        env={"PATH": "/usr/bin", "PYTHONIOENCODING": "ascii", "PYTHONPATH": "."},
    )
    assert result.returncode == 1 and "gr\\xf6\\xdfe" in result.stderr
    assert "Traceback" not in result.stderr
