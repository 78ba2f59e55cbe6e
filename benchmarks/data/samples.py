"""Samples, their index and blends, against megatron-core's."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from peers import SEED, SEQ_LENGTH, cpu_seconds, cpu_seconds_a_pass
from report import Report
from setting import Corpus, Setting, in_fresh_process

from megagpt.config.schema import DataConfig
from megagpt.data.datasets import build_datasets
from megagpt.data.indexed.dataset import IndexedDataset, token_dtype
from megagpt.data.indexed.manifest import publish_pair, tokenizer_facts
from megagpt.data.indexed.writer import IndexedDatasetWriter, WriterState
from megagpt.data.samples.blend import Blend
from megagpt.data.samples.gpt_dataset import GPTDataset
from megagpt.data.samples.masks import document_boundaries, tokens_to_batch
from megagpt.data.tokenizers.load import load_tokenizer

_BATCH = 8
_NUM_READ = 40_000
_NUM_MASKED = 64  # a dense mask takes the peer some 20 ms
_BLEND_WEIGHTS = [0.5, 0.3, 0.2]
_BLEND_BLOCK = 1 << 16


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
    dataset = _dataset(IndexedDataset(prefix), corpus, None)
    batches = np.load(numbers).reshape(-1, _BATCH).tolist()
    out = np.empty((_BATCH, SEQ_LENGTH + 1), dtype=np.int64)

    def read_all() -> None:
        for batch in batches:
            dataset.gather(batch, out)
            if masks:
                tokens, _ = tokens_to_batch(out, masked_after=corpus.eod)
                document_boundaries(tokens, corpus.eod)

    return cpu_seconds_a_pass(read_all) / (len(batches) * _BATCH)


def _dataset(indexed: IndexedDataset, corpus: Corpus, cache: Path | None) -> GPTDataset:
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
        facts = tokenizer_facts(load_tokenizer("byte"))  # so that no file of one is looked for
        facts |= {"vocab_size": corpus.vocab_size, "eod": corpus.eod}
        publish_pair(writer, **facts, text_bytes=None)


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
        dataset = _dataset(indexed, corpus, cache)
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
