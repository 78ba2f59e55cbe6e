"""Measures the data pipeline against SentencePiece and Megatron-LM: peer's cost / ours.

Every cost is CPU-seconds, user and system, of a fresh process; the sides take turns and medians
count. Preprocessing is the whole command, with all its processes, against SentencePiece's encoding
of the same documents alone. Reading, index and blend are timed inside the process, after its
imports, against megatron-core in an interpreter named by --peer_python; a throw-away one is made by

    python -m venv peer && peer/bin/pip install megatron-core==0.16.1 torch

What has no peer, or no text, is null in the JSON with its reason. Ends with 0 whenever it has
measured; `ok` tells what meets its bar. Needs Linux (/proc). Next file: `data_peers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_peers import SEED, SEQ_LENGTH, cpu_seconds, cpu_seconds_a_pass

from megagpt.config.command import run_command
from megagpt.config.schema import DataConfig
from megagpt.data.blend import Blend
from megagpt.data.datasets import build_datasets
from megagpt.data.documents import read_documents
from megagpt.data.gpt_dataset import GPTDataset
from megagpt.data.index_cache import SMALLEST_CACHED_BYTES, IndexCache
from megagpt.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    WriterState,
    bin_path,
    idx_path,
    token_dtype,
)
from megagpt.data.manifest import Manifest, file_sha256, read_manifest, write_manifest
from megagpt.data.masks import document_boundaries, tokens_to_batch
from megagpt.data.native import load_native
from megagpt.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

_TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"
_PEERS = Path(__file__).with_name("data_peers.py")

AT_LEAST = {
    "preprocess_1_worker_cpu_ratio": 4.0,
    "preprocess_2_workers_cpu_ratio": 4.0,
    "sample_read_ratio": 5.0,
    "document_mask_ratio": 500.0,
    "index_build_ratio": 1.0,
    "blend_build_ratio": 1.0,
}
"""Bars of the ratios peer / ours."""
AT_MOST = {"preprocess_peak_mb": 240.0, "bytes_per_sample": 12.0, "cached_start_ms": 20.0}
"""Bars of what has no peer."""

_BATCH = 8
_NUM_READ = 40_000
_NUM_MASKED = 64  # a dense mask takes the peer some 20 ms
_BLEND_WEIGHTS = [0.5, 0.3, 0.2]
_BLEND_BLOCK = 1 << 16
_CHECKED_BYTES = 2_000_000
_TRAINED_BYTES = 20_000_000
_TRAINED_VOCABULARY = 32_000
_PSS_SECONDS = 0.05
_FORMAT_CHECKS = ("megatron_bytes_identical", "megatron_reads_ours")


@dataclass
class Report:
    """What was measured, by name."""

    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Unit, and the medians and single runs of each side."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a figure is missing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What has no bar."""

    def add(
        self,
        name: str,
        ours: Callable[[], float],
        *,
        unit: str,
        repeats: int,
        scale: float = 1,
        peer: Callable[[], float] | None = None,
        reason: str = "",
    ) -> None:
        """Measures both sides in turn.

        Args:
            name: Of the figure.
            ours: Measures our side once.
            unit: Of what it returns, times `scale`.
            repeats: Times that each side is measured.
            scale: Factor to the unit.
            peer: Measures the other side once; None where there is none.
            reason: Why there is none, for a ratio.
        """
        runs: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(repeats):
            runs["ours"].append(ours() * scale)
            if peer is not None:
                runs["peer"].append(peer() * scale)
        medians = {side: statistics.median(each) if each else None for side, each in runs.items()}
        self.measured[name] = {"unit": unit, **medians, "runs": runs}
        if reason:
            self.reasons[name] = reason
        figures = ", ".join(f"{side} {_cell(medians[side], unit)}" for side in medians)
        print(f"{name}: {figures}", file=sys.stderr, flush=True)

    def value(self, name: str) -> float | None:
        """The figure that has a bar; None where it is missing."""
        sides = self.measured.get(name)
        if sides is None or name in self.reasons:
            return None
        return sides["ours"] if name in AT_MOST else sides["peer"] / sides["ours"]

    def is_ok(self, name: str) -> bool | None:
        """Whether a figure meets its bar; None where it is missing."""
        value = self.value(name)
        if value is None:
            return None
        return value <= AT_MOST[name] if name in AT_MOST else value >= AT_LEAST[name]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = [*AT_LEAST, *AT_MOST]
        return {
            **{name: self.value(name) for name in names},
            **self.facts,
            "bars": {**AT_LEAST, **AT_MOST},
            "ok": {name: self.is_ok(name) for name in names},
            "reasons": self.reasons,
            "measured": self.measured,
        }

    def table(self) -> str:
        """Figures under their bars."""
        # Brings torch, which no measured process should have loaded.
        from runs import markdown_table

        rows = []
        for name in (*AT_LEAST, *AT_MOST):
            sides, value = self.measured.get(name, {}), self.value(name)
            cells = [_cell(sides.get(side), sides.get("unit")) for side in ("ours", "peer")]
            ratio = f"{value:.2f}" if value is not None and name in AT_LEAST else "-"
            bar = f">= {AT_LEAST[name]:g}" if name in AT_LEAST else f"<= {AT_MOST[name]:g}"
            ok = {True: "yes", False: "NO", None: "-"}[self.is_ok(name)]
            rows.append([name, *cells, ratio, bar, ok])
        return markdown_table(["name", "ours", "peer", "ratio", "bar", "ok"], rows)


def _cell(value: float | None, unit: str | None) -> str:
    return "-" if value is None else f"{value:.4g} {unit}"


@dataclass(frozen=True)
class Corpus:
    """What made-up pairs take from a real one."""

    lengths: np.ndarray
    """[d], tokens of documents, end of document included."""
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    work_dir: Path
    """For files, some gigabytes."""
    repeats: int
    """Times that each side is measured."""
    megatron: str | None
    """An interpreter with megatron-core."""
    reason: str
    """Why there is none; else empty."""

    def megatron_job(self, name: str, **arguments: Any) -> Callable[[], Any] | None:
        """A job of `data_peers.py`, to be called; None where there is no interpreter."""
        python = self.megatron
        return None if python is None else lambda: run_peers(python, name, [arguments])[0]


def reason_against(python: str | None) -> str:
    """Why an interpreter cannot run the jobs with Megatron; empty where it can."""
    if python is None:
        return "no --peer_python; name an interpreter that has megatron-core"
    try:
        run_peers(python, "probe", [{}])
    except (RuntimeError, OSError) as error:
        return f"{error}; install megatron-core there"
    return ""


def run_peers(python: str, name: str, jobs: list[dict[str, Any]]) -> list[Any]:
    """Runs a job of `data_peers.py` with each of the arguments, all at once.

    Raises:
        RuntimeError: If one fails.
    """
    processes = [
        subprocess.Popen(
            [python, str(_PEERS), name, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in jobs
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{name} in {python} ended with {process.returncode}: {last}")
    # Megatron prints too.
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of this file in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


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
    return [sys.executable, str(_TOOL), *flags]


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
        raise RuntimeError(f"{_TOOL.name} ended with {returncode}: {errors.strip()}")


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
        report.reasons |= dict.fromkeys(_FORMAT_CHECKS, setting.reason)
        return
    part, ours, theirs, ids = (
        setting.work_dir / name for name in ("part.jsonl", "ours", "theirs", "ids.json")
    )
    _copy_documents(text, part, _CHECKED_BYTES)
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


def _copy_documents(source: Path, target: Path, num_bytes: int) -> None:
    """Copies the first lines of a JSONL file that hold so much text."""
    with source.open("rb") as lines, target.open("wb") as copy:
        copied = 0
        for line in lines:
            if copied >= num_bytes:
                break
            copy.write(line)
            copied += len(json.loads(line)["text"].encode())


def measure_reading(report: Report, setting: Setting, *, corpus: Corpus, num_tokens: int) -> None:
    """Random samples of a pair in memory, plain and with documents kept apart."""
    prefix, numbers = setting.work_dir / "read", setting.work_dir / "read_samples.npy"
    generator = np.random.default_rng(SEED)
    write_pair(prefix, corpus, num_tokens=num_tokens, generator=generator)
    np.save(numbers, generator.integers(0, (num_tokens - 1) // SEQ_LENGTH, _NUM_READ))
    same = {"prefix": str(prefix), "samples": str(numbers), "eod": corpus.eod}
    for name, masks, peer in (
        ("sample_read_ratio", False, setting.megatron_job("read_samples", **same)),
        (
            "document_mask_ratio",
            True,
            setting.megatron_job("read_masked_samples", **same, count=_NUM_MASKED),
        ),
    ):
        report.add(
            name,
            partial(in_fresh_process, _read_ours, prefix, numbers, corpus, masks),
            peer=peer,
            reason=setting.reason,
            unit="CPU-us/sample",
            scale=1e6,
            repeats=setting.repeats,
        )


def _read_ours(prefix: Path, numbers: Path, corpus: Corpus, masks: bool) -> float:
    dataset = _dataset(IndexedDataset(prefix), corpus, IndexCache(None))
    batches = np.load(numbers).reshape(-1, _BATCH).tolist()
    out = np.empty((_BATCH, SEQ_LENGTH + 1), dtype=np.int64)

    def read_all() -> None:
        for batch in batches:
            dataset.gather(batch, out)
            if masks:
                tokens, _ = tokens_to_batch(out, masked_after=corpus.eod)
                document_boundaries(tokens, corpus.eod)

    return cpu_seconds_a_pass(read_all) / (len(batches) * _BATCH)


def _dataset(indexed: IndexedDataset, corpus: Corpus, cache: IndexCache) -> GPTDataset:
    return GPTDataset(
        indexed,
        range(indexed.num_documents),
        seq_length=SEQ_LENGTH,
        seed=SEED,
        cache=cache,
        vocab_size=corpus.vocab_size,
    )


def write_pair(
    prefix: Path, corpus: Corpus, *, num_tokens: int, generator: np.random.Generator | None
) -> None:
    """Writes a pair with real lengths of documents, and its manifest.

    Args:
        prefix: Of the pair.
        corpus: Where lengths, vocabulary and end of document are from.
        num_tokens: To write.
        generator: Draws the tokens; None leaves .bin all zeros, a hole that takes no disk.
    """
    lengths = _draw_lengths(corpus.lengths, num_tokens)
    with IndexedDatasetWriter(prefix, token_dtype(corpus.vocab_size)) as writer:
        if generator is None:
            os.truncate(writer.directory / "tokens", num_tokens * writer.dtype.itemsize)
            writer.rewind(WriterState(num_tokens=num_tokens))
            writer.add_lengths(lengths, np.ones(len(lengths), dtype=np.int32))
        else:
            tokens = generator.integers(0, corpus.vocab_size, num_tokens, dtype=writer.dtype)
            tokens[tokens == corpus.eod] = (corpus.eod + 1) % corpus.vocab_size
            tokens[np.cumsum(lengths, dtype=np.int64) - 1] = corpus.eod
            writer.add_documents(tokens, lengths)
    manifest = Manifest(
        tokenizer_kind="byte",  # so that no file of a tokenizer is looked for
        tokenizer_path="byte",
        tokenizer_sha256="0" * 64,
        vocab_size=corpus.vocab_size,
        eod=corpus.eod,
        dtype=writer.dtype.name,
        num_tokens=num_tokens,
        num_documents=len(lengths),
        text_bytes=num_tokens,
        largest_token=corpus.vocab_size - 1,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=file_sha256(idx_path(prefix)),
        bin_crc32=tuple(writer.bin_crc32),
    )
    write_manifest(prefix, manifest)


def _draw_lengths(lengths: np.ndarray, num_tokens: int) -> np.ndarray:
    """Draws documents until they hold so many tokens; the last one is cut to fit."""
    generator = np.random.default_rng(SEED)
    drawn = np.empty(0, dtype=np.int32)
    while (total := int(drawn.sum(dtype=np.int64))) < num_tokens:
        count = math.ceil(1.1 * (num_tokens - total) / lengths.mean())
        drawn = np.concatenate([drawn, generator.choice(lengths, count)])
    ends = np.cumsum(drawn, dtype=np.int64)
    drawn = drawn[: np.searchsorted(ends, num_tokens) + 1]
    drawn[-1] -= drawn.sum(dtype=np.int64) - num_tokens
    return drawn


def measure_index(report: Report, setting: Setting, *, corpus: Corpus, num_tokens: int) -> None:
    """Building two epochs of a pair, and what they take on disk."""
    prefix = setting.work_dir / "index"
    write_pair(prefix, corpus, num_tokens=num_tokens, generator=None)
    sizes: dict[str, float] = {}

    def build_ours() -> float:
        with tempfile.TemporaryDirectory(dir=setting.work_dir) as fresh:
            seconds, found = in_fresh_process(_build_ours, prefix, Path(fresh), corpus)
        sizes.update(found)
        return seconds

    def build_peer() -> float:
        with tempfile.TemporaryDirectory(dir=setting.work_dir) as fresh:
            options = {"cache": fresh, "num_samples": (2 * num_tokens - 1) // SEQ_LENGTH}
            job = setting.megatron_job("build_index", prefix=str(prefix), **options)
            assert job is not None
            return job()

    report.add(
        "index_build_ratio",
        build_ours,
        peer=build_peer if setting.megatron else None,
        reason=setting.reason,
        unit="CPU-s",
        repeats=setting.repeats,
    )
    report.facts["index_file_bytes_per_sample"] = sizes
    report.add("bytes_per_sample", lambda: sum(sizes.values()), unit="bytes", repeats=1)
    _measure_start(report, setting, prefix=prefix)


def _measure_start(report: Report, setting: Setting, *, prefix: Path) -> None:
    """Opening the splits of a pair with their indices kept from an earlier start."""
    cache = setting.work_dir / "index_cache"
    in_fresh_process(_start_ours, prefix, cache)
    cpu: list[float] = []

    def start() -> float:
        wall_seconds, start_cpu_seconds = in_fresh_process(_start_ours, prefix, cache)
        cpu.append(start_cpu_seconds * 1e3)
        return wall_seconds

    repeats = max(setting.repeats, 5)  # by the wall clock, which is noisier
    report.add("cached_start_ms", start, unit="ms", scale=1e3, repeats=repeats)
    report.facts["cached_start_cpu_ms"] = statistics.median(cpu)


def _build_ours(prefix: Path, cache: Path, corpus: Corpus) -> tuple[float, dict[str, float]]:
    """CPU-seconds of two epochs, and bytes a sample of each file of an epoch."""
    indexed = IndexedDataset(prefix)
    built: list[GPTDataset] = []

    def build() -> None:
        dataset = _dataset(indexed, corpus, IndexCache(cache))
        dataset.gather([len(dataset)])  # the first sample of the second epoch
        built.append(dataset)

    seconds = cpu_seconds(build)
    entry = next(path for path in cache.iterdir() if path.is_dir())
    files = {path.stem: path.stat().st_size / len(built[0]) for path in entry.glob("*.npy")}
    return seconds, files


def _start_ours(prefix: Path, cache: Path) -> tuple[float, float]:
    """Seconds and CPU-seconds of building all splits."""
    data = DataConfig(path=str(prefix), split="969,30,1", index_cache=str(cache))
    begin = time.perf_counter()
    seconds = cpu_seconds(lambda: build_datasets(data, seq_length=SEQ_LENGTH, seed=SEED))
    return time.perf_counter() - begin, seconds


def measure_blend(report: Report, setting: Setting, *, num_positions: int) -> None:
    """Members and sample numbers of all positions of a blend of three."""
    report.add(
        "blend_build_ratio",
        partial(in_fresh_process, _blend_ours, num_positions),
        peer=setting.megatron_job("build_blend", weights=_BLEND_WEIGHTS, count=num_positions),
        reason=setting.reason,
        unit="CPU-s",
        repeats=setting.repeats,
    )


def _blend_ours(num_positions: int) -> float:
    blend = Blend(_BLEND_WEIGHTS)

    def walk() -> None:
        for begin in range(0, num_positions, _BLEND_BLOCK):
            blend.slice(begin, min(_BLEND_BLOCK, num_positions - begin))

    return cpu_seconds(walk)


def main(arguments: list[str]) -> int:
    """Measures all that the options allow, prints the table and writes the JSON."""
    options = _parse(arguments)
    report = Report(facts=dict.fromkeys(_FORMAT_CHECKS))
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
        measure_reading(report, setting, corpus=corpus, num_tokens=options.read_tokens)
        measure_index(report, setting, corpus=corpus, num_tokens=options.index_tokens)
        measure_blend(report, setting, num_positions=options.blend_positions)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.record(), indent=1) + "\n")
    print(report.table())
    for name, why in report.reasons.items():
        print(f"{name}: {why}")
    return 0


def _measure_text(report: Report, setting: Setting, *, options: argparse.Namespace) -> Corpus:
    """What needs a text; returns what made-up pairs take from it, or from a guess."""
    if options.text is None:
        missing = [name for name in (*AT_LEAST, *AT_MOST) if name.startswith("preprocess")]
        reason = "no --text; name a JSONL file"
        report.reasons |= dict.fromkeys([*missing, *_FORMAT_CHECKS], reason)
        report.facts["document_lengths"] = "log-normal"
        # Mean 1,240 and median 620 tokens: 4 kB and 2 kB of text.
        generator = np.random.default_rng(SEED)
        lengths = generator.lognormal(math.log(620), math.sqrt(2 * math.log(2)), 40_000)
        return Corpus(np.maximum(lengths, 2).astype(np.int32), _TRAINED_VOCABULARY, 1)
    text = setting.work_dir / "text.jsonl"
    _copy_documents(options.text, text, round(options.megabytes * 1e6))
    tokenizer = options.tokenizer or _train_tokenizer(text, setting.work_dir)
    SentencePieceTokenizer(tokenizer)  # another kind has no peer here
    report.facts["document_lengths"] = "of the text"
    check_format(report, setting, text=text, tokenizer=tokenizer)
    return measure_preprocessing(report, setting, text=text, tokenizer=tokenizer)


def _train_tokenizer(text: Path, work_dir: Path) -> Path:
    part, model = work_dir / "tokenizer_text.jsonl", work_dir / "tokenizer.model"
    _copy_documents(text, part, _TRAINED_BYTES)
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
