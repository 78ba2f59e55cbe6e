"""Measures the data pipeline against SentencePiece and Megatron-LM: peer's cost / ours.

Every cost is CPU-seconds, user and system, of a fresh process; the sides take turns and medians
count. Preprocessing is the whole command, with all its processes, against SentencePiece's encoding
of the same documents alone. Reading, index and blend are timed inside the process, after its
imports, against megatron-core in an interpreter named by --peer_python; a throw-away one is made by

    python -m venv peer && peer/bin/pip install megatron-core==0.16.1 torch

What has no peer, or no text, is null in the JSON with its reason. Ends with 0 whenever it has
measured; `ok` tells what meets its bar. Needs Linux (/proc). The peers are in `peers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from order import check_order
from peers import SEED, SEQ_LENGTH
from preprocessing import FORMAT_CHECKS, check_format, measure_preprocessing
from report import AT_LEAST, AT_MOST, Report
from samples import measure_blend, measure_index, measure_reading
from setting import Corpus, Setting, copy_documents, reason_against

from megagpt.config.command import run_command
from megagpt.data.native import load_native
from megagpt.data.preprocessing.documents import read_documents
from megagpt.data.samples.index_cache import SMALLEST_CACHED_BYTES
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from megagpt.testing.report import write_records

_TRAINED_BYTES = 20_000_000
_TRAINED_VOCABULARY = 32_000


def main(arguments: list[str]) -> int:
    """Measures all that the options allow, prints the table and writes the JSON."""
    options = _parse(arguments)
    report = Report(facts=dict.fromkeys(FORMAT_CHECKS))
    for name in ("repeats", "read_tokens", "index_tokens", "blend_positions"):
        report.facts[name] = getattr(options, name)
    # Compiled before anything is timed: once for a user, not once a run.
    report.facts["is_compiled"] = load_native() is not None
    reason = reason_against(options.peer_python)
    with _work_directory(options.work_dir) as work_dir:
        setting = Setting(
            work_dir, options.repeats, None if reason else options.peer_python, reason
        )
        corpus = _measure_text(report, setting, options=options)
        check_order(report, setting)
        measure_reading(report, setting, corpus=corpus, num_tokens=options.read_tokens)
        measure_index(report, setting, corpus=corpus, num_tokens=options.index_tokens)
        measure_blend(report, setting, num_positions=options.blend_positions)
    write_records(options.json, report.record())
    print(report.table())
    for name, why in report.reasons.items():
        print(f"{name}: {why}")
    return 0


def _measure_text(report: Report, setting: Setting, *, options: argparse.Namespace) -> Corpus:
    """What needs a text; returns what made-up pairs take from it, or from a guess."""
    if options.text is None:
        missing = [name for name in (*AT_LEAST, *AT_MOST) if name.startswith("preprocess")]
        reason = "no --text; name a JSONL file"
        report.reasons |= dict.fromkeys([*missing, *FORMAT_CHECKS], reason)
        report.facts["document_lengths"] = "log-normal"
        # Mean 1,240 and median 620 tokens: 4 kB and 2 kB of text.
        generator = np.random.default_rng(SEED)
        lengths = generator.lognormal(math.log(620), math.sqrt(2 * math.log(2)), 40_000)
        return Corpus(np.maximum(lengths, 2).astype(np.int32), _TRAINED_VOCABULARY, 1)
    text = setting.work_dir / "text.jsonl"
    copy_documents(options.text, text, round(options.megabytes * 1e6))
    tokenizer = options.tokenizer or _train_tokenizer(text, setting.work_dir)
    SentencePieceTokenizer(tokenizer)  # another kind has no peer here
    report.facts["document_lengths"] = "of the text"
    check_format(report, setting, text=text, tokenizer=tokenizer)
    return measure_preprocessing(report, setting, text=text, tokenizer=tokenizer)


def _train_tokenizer(text: Path, work_dir: Path) -> Path:
    part, model = work_dir / "tokenizer_text.jsonl", work_dir / "tokenizer.model"
    copy_documents(text, part, _TRAINED_BYTES)
    train_sentencepiece(read_documents([part]), model, vocab_size=_TRAINED_VOCABULARY)
    return model


@contextlib.contextmanager
def _work_directory(named: Path | None) -> Iterator[Path]:
    """A new folder in the named one (default: where temporary files go), removed at the end."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=named) as directory:
        yield Path(directory)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="write the record here")
    parser.add_argument("--text", type=Path, help="JSONL corpus, one document a line under `text`")
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model; default: trained on the text"
    )
    parser.add_argument("--megabytes", type=float, default=150, help="text to encode")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--peer_python", help="interpreter that has megatron-core")
    parser.add_argument("--work_dir", type=Path, help="where some gigabytes can be written")
    parser.add_argument("--read_tokens", type=int, default=10**8, help="of the pair to read")
    parser.add_argument("--index_tokens", type=int, default=10**9, help="of the pair to index")
    parser.add_argument("--blend_positions", type=int, default=10**8, help="of the blend")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats} must be at least 1; give a positive number")
    # A smaller index is not kept, so its size could not be seen nor a start with it measured.
    smallest = {
        "read_tokens": SEQ_LENGTH + 1,
        "index_tokens": SMALLEST_CACHED_BYTES // 8 * 2 * SEQ_LENGTH,
    }
    for name, num_tokens in smallest.items():
        if getattr(options, name) < num_tokens:
            raise ValueError(
                f"{name}={getattr(options, name)} must be at least {num_tokens}; give more tokens"
            )
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
