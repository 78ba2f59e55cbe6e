"""The whole of preprocessing against SentencePiece's encoding, and its pair against Megatron's."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import Report
from setting import Corpus, Setting, copy_documents, run_peers

from megagpt.data.indexed.dataset import IndexedDataset, bin_path, idx_path
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.documents import read_documents

FORMAT_CHECKS = ("megatron_bytes_identical", "megatron_reads_ours")

_CHECKED_BYTES = 2_000_000
_PSS_SECONDS = 0.05


def measure_preprocessing(
    report: Report, setting: Setting, *, text: Path, tokenizer: Path
) -> Corpus:
    """The command on a text, against SentencePiece; returns what came of it."""
    prefix = setting.work_dir / "real"
    for workers, name in ((1, "1_worker"), (2, "2_workers")):
        parts = [
            {"text": str(text), "tokenizer": str(tokenizer), "part": part, "num_parts": workers}
            for part in range(workers)
        ]
        report.add(
            f"preprocess_{name}_cpu_ratio",
            partial(_command_cpu_seconds, _command(text, tokenizer, prefix, workers=workers)),
            peer=partial(_sentencepiece_cpu_seconds, parts),
            unit="CPU-s",
            repeats=setting.repeats,
        )
    report.add(
        "preprocess_peak_mb",
        partial(_peak_pss_bytes, _command(text, tokenizer, prefix, workers=2)),
        unit="MB",
        scale=1e-6,
        repeats=setting.repeats,
    )
    manifest = read_manifest(prefix)
    assert manifest is not None and manifest.text_bytes is not None
    report.facts["text_mb"] = manifest.text_bytes / 1e6
    lengths = np.array(IndexedDataset(prefix).sequence_lengths)
    return Corpus(lengths, manifest.vocab_size, manifest.eod)


def _command(text: Path, tokenizer: Path, prefix: Path, *, workers: int) -> list[str]:
    options = {"input": text, "output_prefix": prefix, "tokenizer": tokenizer, "workers": workers}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "megagpt", "preprocess", *flags]


def _command_cpu_seconds(command: list[str]) -> float:
    """CPU-seconds of a command and of all processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    _require_success(done.returncode, done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _sentencepiece_cpu_seconds(parts: list[dict[str, Any]]) -> float:
    return sum(run_peers(sys.executable, "encode", parts))


def _require_success(returncode: int, errors: str) -> None:
    if returncode:
        raise RuntimeError(f"megagpt preprocess ended with {returncode}: {errors.strip()}")


def _peak_pss_bytes(command: list[str]) -> int:
    """Largest sum, over a command's processes, of memory with shared pages divided by users."""
    peak = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(_pss_bytes, _session(process.pid))))
                time.sleep(_PSS_SECONDS)
        finally:
            process.kill()  # an interrupt does not reach a session of its own
        errors.seek(0)
        _require_success(process.returncode, errors.read())
    return peak


def _session(leader: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(entry.name)) == leader:
                    yield int(entry.name)


def _pss_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended meanwhile
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def check_format(report: Report, setting: Setting, *, text: Path, tokenizer: Path) -> None:
    """Whether our pair is, byte for byte, what Megatron's builder makes of SentencePiece's tokens.

    A text with U+2581 differs: SentencePiece alone takes it for a space.
    """
    if setting.megatron is None:
        report.reasons |= dict.fromkeys(FORMAT_CHECKS, setting.reason)
        return
    part, ours, theirs, ids = (
        setting.work_dir / name for name in ("part.jsonl", "ours", "theirs", "ids.json")
    )
    copy_documents(text, part, _CHECKED_BYTES)
    _command_cpu_seconds(_command(part, tokenizer, ours, workers=2))
    manifest = read_manifest(ours)
    assert manifest is not None
    ids.write_text(json.dumps(_sentencepiece_ids(part, tokenizer, manifest.eod)))
    job = setting.megatron_job(
        "write_pair",
        ids=str(ids),
        prefix=str(theirs),
        other=str(ours),
        vocab_size=manifest.vocab_size,
    )
    assert job is not None
    report.facts["megatron_reads_ours"] = job()
    report.facts["megatron_bytes_identical"] = all(
        filecmp.cmp(path(ours), path(theirs), shallow=False) for path in (bin_path, idx_path)
    )


def _sentencepiece_ids(text: Path, tokenizer: Path, eod: int) -> list[list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer))
    return [[*processor.encode(document), eod] for document in read_documents([text])]
