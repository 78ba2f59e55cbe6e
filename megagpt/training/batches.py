"""Samples to micro-batches of tensors, with what document masking and dropout need.

Next file: `train_step.py`, which feeds them to the engine.
"""

# b micro-batch, s sequence

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megagpt.config.schema import Config
from megagpt.data.gpt_dataset import PAD, GPTDataset, document_positions, tokens_to_batch
from megagpt.data.manifest import read_manifest
from megagpt.data.sampler import BatchSampler
from megagpt.model.dropout import dropout_keys
from megagpt.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of a data-parallel rank reads."""

    tokens: torch.Tensor
    """[b, s], int64."""
    labels: torch.Tensor
    """[b, s], int64: the next tokens, or IGNORE_INDEX."""
    position_ids: torch.Tensor | None = None
    """[b, s], int64, 0 where a document begins; None: one document a sample."""
    dropout_keys: torch.Tensor | None = None
    """[b], int64; None without dropout."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose loss counts."""
        return int((self.labels != IGNORE_INDEX).sum())

    def pipeline_inputs(self) -> tuple[torch.Tensor, ...]:
        """What the first stage takes, see `megagpt.model.pipeline.GPTStage`."""
        tensors = (self.tokens, self.labels, self.position_ids, self.dropout_keys)
        return tuple(t for t in tensors if t is not None)


class Batches:
    """The micro-batches of one data-parallel index.

    Args:
        config: Of the run.
        datasets: By split.
        dp_rank: This rank among the data-parallel ranks.
        dp_size: Data-parallel ranks.

    Raises:
        ValueError: If masking is asked for and nothing tells which token ends documents.
    """

    def __init__(
        self, config: Config, datasets: dict[str, GPTDataset], *, dp_rank: int, dp_size: int
    ) -> None:
        self.config = config
        self.datasets = datasets
        self.eod = _end_of_document(config)
        self.sampler = BatchSampler(
            global_batch_size=config.batch.global_batch_size,
            micro_batch_size=config.batch.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )

    def training(self, consumed_samples: int, *, step: int) -> list[MicroBatch]:
        """The micro-batches of the step (from 1) that begins at consumed_samples."""
        dataset = self.datasets["train"]
        return [
            self._micro_batch(np.stack([dataset[i] for i in indices]), indices, step=step)
            for indices in self.sampler.micro_batches(consumed_samples)
        ]

    def evaluation(self, split: str) -> Iterator[MicroBatch]:
        """The micro-batches of an evaluation, as many on every rank."""
        dataset = self.datasets[split]
        count = min(len(dataset), self.config.training.eval_samples or len(dataset))
        padding = np.full(self.config.model.seq_length + 1, PAD, dtype=np.int64)
        for indices in self.sampler.evaluation_batches(count):
            samples = np.stack([dataset[i] if i >= 0 else padding for i in indices])
            yield self._micro_batch(samples, indices, step=0)

    def _micro_batch(self, samples: np.ndarray, indices: list[int], *, step: int) -> MicroBatch:
        """Tensors of samples [b, s + 1]."""
        data = self.config.data
        tokens, labels = tokens_to_batch(
            samples, masked_after=self.eod if data.eod_mask_loss else None
        )
        positions = keys = None
        if data.document_masking:
            assert self.eod is not None
            positions = torch.from_numpy(document_positions(tokens, self.eod))
        if self.config.model.dropout:
            # In evaluation too, where nothing is dropped: a pipeline's messages keep their form.
            keys = dropout_keys(torch.tensor(indices), seed=self.config.training.seed, step=step)
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), positions, keys)


def _end_of_document(config: Config) -> int | None:
    """The token that ends documents, from the data's manifest; needed by masking only."""
    prefix = config.data.train_path or config.data.path
    manifest = read_manifest(prefix or "")
    if manifest is not None:
        return manifest.eod
    for name in ("document_masking", "eod_mask_loss"):
        if getattr(config.data, name):
            raise ValueError(
                f"data.{name}=true needs the token that ends documents, and {prefix} has no "
                "manifest that tells it; preprocess the data with tools/preprocess_data.py, or "
                "turn it off"
            )
    return None
