"""From the configuration's `data` section to a dataset for each split.

Next files: `samples/gpt_dataset.py` (one pair), `samples/blended_dataset.py` (several).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.config.schema import DataConfig
from megagpt.data.indexed.dataset import IndexedDataset, idx_path
from megagpt.data.indexed.manifest import Manifest, read_manifest, require_one_tokenizer
from megagpt.data.indexed.splits import SPLITS, split_bounds
from megagpt.data.samples.blended_dataset import BlendedDataset, JoinedDataset
from megagpt.data.samples.gpt_dataset import GPTDataset, MegatronOrder
from megagpt.data.tokenizers.load import tokenizer_sha256
from megagpt.files import file_sha256

Dataset = GPTDataset | BlendedDataset | JoinedDataset

logger = logging.getLogger("megagpt")


@dataclass(frozen=True)
class Source:
    """A pair, or the part of it, that a split is made from."""

    prefix: str
    weight: float | None
    """In a blend; None: by its size."""
    is_divided: bool
    """Whether `data.split` divides the pair among splits."""


def split_sources(data: DataConfig) -> dict[str, list[Source]]:
    """The pairs of each configured split: train, valid, test, and valid-NAME.

    Raises:
        ValueError: If no data is named.
    """
    if data.path is not None:
        whole = [Source(prefix, weight, True) for prefix, weight in _weighted(data.path)]
        sources = dict.fromkeys(SPLITS, whole)
    elif data.train_path is None:
        raise ValueError(
            "no data is named; give --data.path (pairs to split) or --data.train_path "
            "(the demo's data: make demo)"
        )
    else:
        named = {"train": data.train_path, "valid": data.valid_path, "test": data.test_path}
        sources = {
            split: [Source(prefix, weight, False) for prefix, weight in _weighted(paths)]
            for split, paths in named.items()
            if paths is not None
        }
    for name, prefix in (data.valid_sets or {}).items():
        sources[f"valid-{name}"] = [Source(prefix, None, False)]
    return sources


def first_prefix(data: DataConfig) -> str | None:
    """The first training pair, whose manifest stands for all; None where no data is named."""
    paths = data.train_path or data.path
    return None if paths is None else _weighted(paths)[0][0]


def first_manifest(data: DataConfig) -> Manifest | None:
    """That of the first training pair; None where there is none."""
    prefix = first_prefix(data)
    return read_manifest(prefix) if prefix else None


def data_tokenizer_path(data: DataConfig) -> str | None:
    """The data's tokenizer; None where neither configuration nor manifest names one."""
    manifest = first_manifest(data)
    return data.tokenizer_path or (manifest.tokenizer_path if manifest else None)


def documents_of(data: DataConfig, split: str, source: Source, num_documents: int) -> range:
    """Documents of a pair that a split takes."""
    if not source.is_divided:
        return range(num_documents)
    return range(*split_bounds(data.split, num_documents)[SPLITS.index(split)])


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    seed: int,
    required: tuple[str, ...] = ("train",),
    vocab_size: int | None = None,
    train_samples: int | None = None,
) -> dict[str, Dataset]:
    """The splits of the configured data: training shuffled, validation and test in file order.

    Args:
        data: Which pairs, and how one pair is divided.
        seq_length: Tokens that a sample predicts.
        seed: Seed of the training order.
        required: Splits that must hold text; another without documents is left out.
        vocab_size: Of the model, above all tokens.
        train_samples: Samples of the whole run; with data.order=megatron only.

    Returns:
        Dataset by split: train and, where there are documents, valid, test and valid-NAME.

    Raises:
        ValueError: If data is missing, damaged, of different tokenizers, or too little.
    """
    sources = split_sources(data)
    manifests = {s.prefix: read_manifest(s.prefix) for each in sources.values() for s in each}
    _require_one_tokenizer(data, manifests)
    opened = {prefix: IndexedDataset(prefix) for prefix in manifests}
    for split in required:
        if split not in sources:
            raise ValueError(f"no {split} data is named; give --data.{split}_path")
    datasets: dict[str, Dataset] = {}
    for split, members in sources.items():
        is_training = split == "train"
        built: list[GPTDataset] = []
        weights: list[float] = []
        problem = ""
        for source in members:
            indexed = opened[source.prefix]
            documents = documents_of(data, split, source, indexed.num_documents)
            if len(documents) == 0:
                problem = f"{source.prefix} holds no documents; give a pair with text"
                if source.is_divided:
                    problem = (
                        f"--data.split={data.split} gives it 0 of the {indexed.num_documents} "
                        f"documents of {source.prefix}; give it a larger share or more documents"
                    )
                continue
            megatron = None
            if is_training and data.order == "megatron":
                assert train_samples is not None, "a replay needs the samples of the run"
                megatron = _megatron_order(data, members, source, indexed, train_samples)
            manifest = manifests[source.prefix]
            dataset = GPTDataset(
                indexed,
                documents,
                seq_length=seq_length,
                seed=seed,
                shuffle=is_training,
                name=split,
                cache=Path(data.index_cache or Path(source.prefix).parent / "index_cache"),
                vocab_size=vocab_size if manifest is None else manifest.vocab_size,
                megatron=megatron,
                builds_ahead=is_training,
            )
            built.append(dataset)
            weights.append(len(dataset) if source.weight is None else source.weight)
        if not built:
            if split in required:
                raise ValueError(f"the {split} split is empty: {problem}")
            logger.info("the %s split is empty and left out: %s", split, problem)
        elif len(built) == 1:
            datasets[split] = built[0]
        elif is_training:
            datasets[split] = BlendedDataset(
                built,
                weights,
                megatron_samples=train_samples if data.order == "megatron" else None,
            )
        else:
            datasets[split] = JoinedDataset(built)
    return datasets


def data_fingerprint(data: DataConfig, *, train_samples: int | None = None) -> dict[str, Any]:
    """What a checkpoint keeps to know the data and its order again; no paths.

    Args:
        data: Which pairs, and how one pair is divided.
        train_samples: Samples of the whole run, on which Megatron's order depends.
    """
    fingerprint: dict[str, Any] = {}
    for split, sources in split_sources(data).items():
        if split != "train" and sources[0].is_divided:
            continue
        fingerprint[split] = []
        for source in sources:
            indexed, manifest = IndexedDataset(source.prefix), read_manifest(source.prefix)
            idx_sha256 = manifest.idx_sha256 if manifest else file_sha256(idx_path(source.prefix))
            fingerprint[split].append(
                {
                    "weight": source.weight,
                    "num_tokens": indexed.num_tokens,
                    "num_documents": indexed.num_documents,
                    "dtype": indexed.dtype.name,
                    "idx_sha256": idx_sha256,
                }
            )
    if data.path is not None:
        fingerprint["split"] = data.split
    if data.order == "megatron":
        fingerprint["megatron_samples"] = train_samples
    return fingerprint


def _weighted(paths: str | list[str] | dict[str, float]) -> list[tuple[str, float | None]]:
    if isinstance(paths, Mapping):
        return list(paths.items())
    return [(path, None) for path in ([paths] if isinstance(paths, str) else paths)]


def _megatron_order(
    data: DataConfig,
    members: list[Source],
    source: Source,
    indexed: IndexedDataset,
    train_samples: int,
) -> MegatronOrder:
    sequences = range(indexed.num_sequences)
    if source.is_divided:
        sequences = range(*split_bounds(data.split, indexed.num_sequences)[0])
    if len(members) == 1:
        return MegatronOrder(sequences, train_samples)
    weights = [member.weight for member in members]
    if source.weight is None or None in weights:
        raise ValueError(
            "data.order=megatron needs the weight of each pair of a blend; write the data as "
            "{prefix: weight}, as in the Megatron run"
        )
    # As Megatron rounds it; it asks each member for so many samples more than its share.
    share = source.weight / float(np.sum(np.array(weights, dtype=np.float64)))
    return MegatronOrder(sequences, math.ceil(math.ceil(train_samples * share) * 1.005))


def _require_one_tokenizer(data: DataConfig, manifests: dict[str, Manifest | None]) -> None:
    known = require_one_tokenizer(manifests)
    if data.tokenizer_path is not None and known is not None:
        prefix, manifest = known
        given = tokenizer_sha256(data.tokenizer_path)
        if given != manifest.tokenizer_sha256:
            raise ValueError(
                f"data.tokenizer_path={data.tokenizer_path} ({given[:12]}) is not the tokenizer of "
                f"{prefix} ({manifest.tokenizer_sha256[:12]}); leave it out or preprocess again"
            )
