"""What is in a pair, in a blend, and in a step of a run, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.config.schema import Config
from megagpt.data.datasets import Dataset, build_datasets
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.samples.blended_dataset import BlendedDataset
from megagpt.data.samples.gpt_dataset import GPTDataset


@dataclass(frozen=True)
class LengthBin:
    """Documents of a range of lengths."""

    shortest: int
    """Tokens."""
    longest: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document in a sample."""

    sample: int
    """Number in the training order, from 0."""
    row: int
    """Place in the global batch."""
    prefix: str
    document: int
    offset: int
    """First token in the document."""
    tokens: np.ndarray


def length_histogram(indexed: IndexedDataset) -> list[LengthBin]:
    """Documents by length, in powers of two; documents without tokens come first."""
    lengths = np.diff(indexed.document_offsets())
    digits = np.frexp(lengths)[1]  # 0, 1, 2-3, 4-7, ...: the number of binary digits
    return [
        LengthBin(
            shortest=(1 << digit) >> 1,
            longest=(1 << digit) - 1,
            num_documents=int(np.sum(digits == digit)),
            num_tokens=int(lengths[digits == digit].sum()),
        )
        for digit in np.unique(digits).tolist()
    ]


def histogram_lines(bins: list[LengthBin]) -> list[str]:
    """The histogram drawn in characters."""
    largest = max((each.num_documents for each in bins), default=1)
    return [
        f"{each.shortest:>9} to {each.longest:<9} {each.num_documents:>10} documents "
        f"{each.num_tokens:>14} tokens "
        f"{'#' * max(1, round(50 * each.num_documents / largest))}"
        for each in bins
    ]


def draw_histogram(bins: list[LengthBin], title: str, path: Path) -> None:
    """The histogram as a picture.

    Raises:
        ValueError: If matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--picture needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(each.shortest) for each in bins], [each.num_documents for each in bins])
    axes.set(title=title, xlabel="tokens in the document, at least", ylabel="documents")
    axes.tick_params(axis="x", rotation=60)
    figure.savefig(path)


def open_training(config: Config) -> Dataset:
    """The training set of a run's configuration, as the trainer opens it.

    Raises:
        ValueError: See `build_datasets`.
    """
    return build_datasets(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
        train_samples=config.training.train_steps * config.batch.global_batch_size,
    )["train"]


def blend_shares(config: Config) -> list[tuple[str, float, int, float]]:
    """What each training pair gives to a whole run.

    Returns:
        Its prefix, its share of the samples asked for, its samples, and how often the run goes
        through it.
    """
    dataset = open_training(config)
    total = config.training.train_steps * config.batch.global_batch_size
    if isinstance(dataset, GPTDataset):
        return [(dataset.indexed.prefix, 1.0, total, total / len(dataset))]
    assert isinstance(dataset, BlendedDataset)
    shares, counts = dataset.blend.shares.tolist(), dataset.counts(total).tolist()
    return [
        (member.indexed.prefix, share, count, count / len(member))
        for member, share, count in zip(dataset.datasets, shares, counts, strict=True)
    ]


def locate(config: Config, step: int) -> Iterator[Piece]:
    """The documents that a step trains on, sample by sample.

    Args:
        config: Of the run.
        step: Optimizer step, from 1.

    Raises:
        ValueError: If the run has no such step.
    """
    if not 1 <= step <= config.training.train_steps:
        raise ValueError(
            f"step={step} is not one of the run's, 1 to {config.training.train_steps}; name one"
        )
    dataset = open_training(config)
    size = config.batch.global_batch_size
    for row, sample in enumerate(range((step - 1) * size, step * size)):
        member, number = dataset, sample
        if isinstance(dataset, BlendedDataset):
            place, number = dataset.locate(sample)
            member = dataset.datasets[place]
        assert isinstance(member, GPTDataset)
        indexed = member.indexed
        for sequence, skip, count in member.pieces(number):
            document = int(np.searchsorted(indexed.document_indices, sequence, "right")) - 1
            first = int(indexed.document_indices[document])
            before = indexed.num_tokens_between(first, sequence)
            tokens = indexed[sequence][skip : skip + count]
            yield Piece(sample, row, indexed.prefix, document, before + skip, tokens)
