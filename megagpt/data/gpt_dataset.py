"""Documents to samples of seq_length + 1 tokens, in an order that (seed, epoch, data) alone fix.

Sample i does not depend on how long the run is, on the batch or on the number of ranks, so a longer
run keeps what it has seen. Which rank takes which sample is the sampler's business (`sampler.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megagpt.config.schema import DataConfig
from megagpt.data.indexed_dataset import IndexedDataset, idx_path
from megagpt.data.manifest import file_sha256, read_manifest
from megagpt.data.tokenizer import tokenizer_sha256

PAD = -1
"""Stands where a sample has no token."""
IGNORE_INDEX = -100
"""Label that the loss leaves out."""
SPLITS = ("train", "valid", "test")

_LABELS = {"train": "training", "valid": "validation", "test": "test"}

logger = logging.getLogger("megagpt")


@dataclass(frozen=True)
class _Epoch:
    """Order of one epoch; d documents with text, n samples."""

    documents: np.ndarray  # [d], position in the dataset's documents, int64
    ends: np.ndarray  # [d], cumulative lengths in this order, int64
    samples: np.ndarray  # [n], place of the sample in the stream, int64


class GPTDataset:
    """Fixed-length samples of a stream of documents.

    The documents of an epoch are joined in a shuffled order; a sample takes seq_length + 1 tokens
    and the next begins at its last, so each token but the first is predicted once. Samples are
    shuffled too; what does not fill one is left out. With `shuffle=False` the order is that of the
    file, there is one epoch, and the last sample is padded with PAD, so that every token but the
    first is scored.

    Args:
        indexed: The pair.
        document_ids: [d], documents of this split.
        seq_length: Tokens that a sample predicts.
        seed: Seed of the order.
        shuffle: Training order (endless epochs) or evaluation order.
        name: Split, for messages.

    Raises:
        ValueError: If the documents do not fill one sample (in evaluation: have under 2 tokens).
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        document_ids: np.ndarray,
        *,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        name: str = "train",
    ) -> None:
        self.indexed = indexed
        self.document_ids = np.asarray(document_ids, dtype=np.int64)
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        offsets = indexed.document_offsets()
        lengths = offsets[self.document_ids + 1] - offsets[self.document_ids]
        with_text = lengths > 0
        self._starts = offsets[self.document_ids][with_text]
        self._lengths = lengths[with_text]
        self.num_tokens = int(self._lengths.sum())
        needed = seq_length + 1 if shuffle else 2
        if self.num_tokens < needed:
            raise ValueError(
                f"model.seq_length={seq_length} needs at least {needed} tokens in the "
                f"{_LABELS[name]} split, {indexed.prefix} has {self.num_tokens} there in "
                f"{len(self.document_ids)} documents; give more text, a larger share in "
                "--data.split or a smaller --model.seq_length"
            )
        whole, rest = divmod(self.num_tokens - 1, seq_length)
        self.samples_per_epoch = whole if shuffle else whole + (rest > 0)
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Samples of one epoch; in training order higher indices go on into the next epochs."""
        return self.samples_per_epoch

    def __iter__(self) -> Iterator[np.ndarray]:
        """The samples of the first epoch."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        """One sample: [seq_length + 1], int64, PAD where the evaluation stream has ended.

        Raises:
            IndexError: If index is negative, or past the one epoch of evaluation.
        """
        if index < 0 or (not self.shuffle and index >= len(self)):
            raise IndexError(f"sample {index} of {len(self)}")
        epoch_number, position = divmod(int(index), self.samples_per_epoch)
        epoch = self._epoch(epoch_number)
        begin = int(epoch.samples[position]) * self.seq_length
        sample = np.full(self.seq_length + 1, PAD, dtype=np.int64)
        count = min(self.seq_length + 1, self.num_tokens - begin)
        place = int(np.searchsorted(epoch.ends, begin, side="right"))
        filled = 0
        while filled < count:
            document = epoch.documents[place]
            skip = begin + filled - (int(epoch.ends[place]) - int(self._lengths[document]))
            taken = min(count - filled, int(self._lengths[document]) - skip)
            start = int(self._starts[document]) + skip
            sample[filled : filled + taken] = self.indexed.tokens[start : start + taken]
            filled += taken
            place += 1
        return sample

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # A batch may straddle two epochs; older ones are not needed again.
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}
            self._epochs[number] = self._build_epoch(number)
        return self._epochs[number]

    def _build_epoch(self, number: int) -> _Epoch:
        documents = np.arange(len(self._lengths))
        samples = np.arange(self.samples_per_epoch)
        if self.shuffle:
            entropy = np.random.SeedSequence([self.seed, number])
            generator = np.random.Generator(np.random.PCG64(entropy))
            documents = generator.permutation(documents)
            samples = generator.permutation(samples)
        return _Epoch(documents, np.cumsum(self._lengths[documents]), samples)


def build_datasets(
    data: DataConfig, *, seq_length: int, seed: int, required: tuple[str, ...] = ("train",)
) -> dict[str, GPTDataset]:
    """The splits of the configured data: training shuffled, validation and test in file order.

    Args:
        data: Which pairs, and how one pair is divided.
        seq_length: Tokens that a sample predicts.
        seed: Seed of the training order.
        required: Splits that must hold text; another without documents is left out.

    Returns:
        Dataset by split: train and, where there are documents, valid and test.

    Raises:
        ValueError: If data is missing, damaged, of different tokenizers, or too little.
    """
    prefixes = split_prefixes(data)
    _require_one_tokenizer(data, prefixes)
    opened = {prefix: IndexedDataset(prefix) for prefix in set(prefixes.values())}
    datasets: dict[str, GPTDataset] = {}
    for split in SPLITS:
        if split not in prefixes:
            if split in required:
                raise ValueError(f"no {_LABELS[split]} data is named; give --data.{split}_path")
            continue
        indexed = opened[prefixes[split]]
        documents = np.arange(indexed.num_documents)
        how = f"--data.{split}_path={prefixes[split]} holds no documents; give a pair with text"
        if data.path is not None:
            first, last = split_bounds(data.split, indexed.num_documents)[SPLITS.index(split)]
            documents = documents[first:last]
            how = (
                f"--data.split={data.split} gives it 0 of the {indexed.num_documents} documents of "
                f"{data.path}; give it a larger share or more documents"
            )
        if len(documents) == 0:
            if split in required:
                raise ValueError(f"the {_LABELS[split]} split is empty: {how}")
            logger.info("the %s split is empty and left out: %s", _LABELS[split], how)
            continue
        datasets[split] = GPTDataset(
            indexed,
            documents,
            seq_length=seq_length,
            seed=seed,
            shuffle=split == "train",
            name=split,
        )
    return datasets


def split_prefixes(data: DataConfig) -> dict[str, str]:
    """Prefix of the pair of each split that is configured.

    Raises:
        ValueError: If no data is named.
    """
    if data.path is not None:
        return dict.fromkeys(SPLITS, data.path)
    if data.train_path is None:
        raise ValueError(
            "no data is named; give --data.path (one pair to split) or --data.train_path "
            "(the demo's data: make demo)"
        )
    named = {"train": data.train_path, "valid": data.valid_path, "test": data.test_path}
    return {split: prefix for split, prefix in named.items() if prefix is not None}


def split_bounds(split: str, num_documents: int) -> list[tuple[int, int]]:
    """Contiguous ranges of documents for train, valid and test.

    Args:
        split: Up to three shares, such as `969,30,1`; they need not sum to 1.
        num_documents: Documents to divide.

    Raises:
        ValueError: If split is not such shares.
    """
    try:
        shares = [float(share) for share in split.split(",")]
        valid = 1 <= len(shares) <= 3 and min(shares) >= 0 and 0 < sum(shares) < float("inf")
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"data.split={split} must be up to three shares, none negative, not all 0; "
            "write it as 969,30,1"
        )
    shares += [0.0] * (3 - len(shares))
    cumulative = np.cumsum([0.0, *shares]) / sum(shares)
    bounds = [round(share * num_documents) for share in cumulative.tolist()]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def data_fingerprint(data: DataConfig) -> dict[str, Any]:
    """What a checkpoint keeps to know the data again: sizes, index hash and split, no paths."""
    fingerprint: dict[str, Any] = {}
    for split, prefix in split_prefixes(data).items():
        if data.path is not None and split != "train":
            continue
        indexed = IndexedDataset(prefix)
        fingerprint["path" if data.path is not None else split] = {
            "num_tokens": indexed.num_tokens,
            "num_documents": indexed.num_documents,
            "dtype": indexed.dtype.name,
            "idx_sha256": file_sha256(idx_path(prefix)),
        }
    if data.path is not None:
        fingerprint["split"] = data.split
    return fingerprint


def tokens_to_batch(
    samples: np.ndarray, *, masked_after: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples to the model's inputs and labels.

    Args:
        samples: [b, s + 1], int64, with PAD where there is no token.
        masked_after: End-of-document token whose successor is not scored; None scores all.

    Returns:
        tokens [b, s] with 0 for PAD, and labels [b, s] with IGNORE_INDEX for PAD; int64.
    """
    tokens, labels = samples[:, :-1], samples[:, 1:]
    unscored = labels == PAD
    if masked_after is not None:
        unscored |= tokens == masked_after
    return np.where(tokens == PAD, 0, tokens), np.where(unscored, IGNORE_INDEX, labels)


def document_positions(tokens: np.ndarray, eod: int) -> np.ndarray:
    """Position of each token in its document.

    Args:
        tokens: [b, s].
        eod: Token that ends a document, and belongs to it.

    Returns:
        [b, s], int64: 0 at the first token and after each eod.
    """
    places = np.arange(tokens.shape[1])
    starts = np.zeros(tokens.shape, dtype=np.int64)
    starts[:, 1:] = np.where(tokens[:, :-1] == eod, places[1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)


def _require_one_tokenizer(data: DataConfig, prefixes: dict[str, str]) -> None:
    manifests = {prefix: read_manifest(prefix) for prefix in dict.fromkeys(prefixes.values())}
    hashes = {
        prefix: manifest.tokenizer_sha256
        for prefix, manifest in manifests.items()
        if manifest is not None
    }
    first = next(iter(hashes), None)
    for prefix, sha256 in hashes.items():
        if first is not None and sha256 != hashes[first]:
            raise ValueError(
                f"{prefix} was made with another tokenizer than {first} ({sha256[:12]}, "
                f"{hashes[first][:12]}); preprocess both with one"
            )
    if data.tokenizer_path is not None and first is not None:
        given = tokenizer_sha256(data.tokenizer_path)
        if given != hashes[first]:
            raise ValueError(
                f"data.tokenizer_path={data.tokenizer_path} ({given[:12]}) is not the tokenizer of "
                f"{first} ({hashes[first][:12]}); leave it out or preprocess again"
            )
