"""Whether `data.order: megatron` gives, sample for sample, what megatron-core gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from report import Report
from setting import Setting

from megagpt.config.schema import DataConfig
from megagpt.data.datasets import build_datasets
from megagpt.data.indexed.dataset import token_dtype
from megagpt.data.indexed.writer import IndexedDatasetWriter

_VOCAB_SIZE = 60_000
_NUM_PAIRS = 6
# Alone, in even and uneven shares, and where one division by the sum rounds another way than two.
_BLENDS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.0, 1.0),
    (0.3, 0.5, 0.2),
    (3.0, 1e-3, 7.0, 2.0, 2.0, 1.0),
    (1 / 3, 1 / 3, 1.0, 1 / 3),
    (0.81, 0.1, 0.1, 0.1, 0.1, 0.41),
    (0.1, 3.0, 3.0, 0.34, 1 / 3, 1 / 3),
)
_SEQ_LENGTHS = (8, 64)
# Within an epoch, several epochs together, and a last epoch apart from the others.
_NUM_SAMPLES = (7, 1000, 4096)
_SPLITS = ("1,0,0", "7,2,1")


def check_order(report: Report, setting: Setting) -> None:
    """Compares all samples of runs over small random pairs; the count of equal runs is a fact."""
    name = "megatron_orders_equal"
    report.facts[name] = None
    if setting.megatron is None:
        report.reasons[name] = setting.reason
        return
    prefixes = _write_pairs(setting.work_dir)
    cases = [
        {"weights": dict(zip(prefixes, weights, strict=False)), "seed": 17 * number + 1}
        | {"seq_length": seq_length, "num_samples": num_samples, "split": split}
        for number, weights in enumerate(_BLENDS)
        for seq_length in _SEQ_LENGTHS
        for num_samples in _NUM_SAMPLES
        for split in _SPLITS
    ]
    out = setting.work_dir / "orders.npz"
    job = setting.megatron_job(
        "replay", cases=cases, out=str(out), vocab_size=_VOCAB_SIZE, directory=str(setting.work_dir)
    )
    assert job is not None
    job()
    with np.load(out) as theirs:
        equal = [
            np.array_equal(_ours(case), theirs[str(number)]) for number, case in enumerate(cases)
        ]
    report.facts[name] = f"{sum(equal)} of {len(cases)}"


def _write_pairs(directory: Path) -> list[str]:
    """Pairs of several hundred sequences; in every other one documents have none to three."""
    generator = np.random.default_rng(0)
    prefixes = [str(directory / f"order_{number}") for number in range(_NUM_PAIRS)]
    for number, prefix in enumerate(prefixes):
        size = 200 + 40 * number
        counts = generator.integers(0, 4, size) if number % 2 else np.ones(size, dtype=np.int64)
        lengths = generator.integers(1, 200, int(counts.sum())).astype(np.int32)
        with IndexedDatasetWriter(prefix, token_dtype(_VOCAB_SIZE)) as writer:
            tokens = generator.integers(1, _VOCAB_SIZE, int(lengths.sum()), dtype=writer.dtype)
            writer.add_tokens(tokens)
            writer.add_lengths(lengths, counts)
    return prefixes


def _ours(case: dict) -> np.ndarray:
    data = DataConfig(path=case["weights"], split=case["split"], order="megatron")
    dataset = build_datasets(
        data,
        seq_length=case["seq_length"],
        seed=case["seed"],
        train_samples=case["num_samples"],
    )["train"]
    return dataset.gather(range(case["num_samples"]))
