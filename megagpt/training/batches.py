"""Samples to micro-batches of tensors, with what document masking and dropout need.

Next file: `train_step.py`, which feeds them to the engine.
"""

# b micro-batch, s sequence

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from megagpt.config.schema import DataConfig, TrainingConfig
from megagpt.data.datasets import Dataset
from megagpt.data.samples.gpt_dataset import PAD
from megagpt.data.samples.masks import IGNORE_INDEX, document_boundaries, tokens_to_batch
from megagpt.data.samples.sampler import BatchSampler
from megagpt.model.dropout import dropout_keys


class MicroBatch(NamedTuple):
    """What one forward pass of a data-parallel rank reads."""

    tokens: torch.Tensor
    """[b, s], int64."""
    labels: torch.Tensor
    """[b, s], int64: the next tokens, or IGNORE_INDEX."""
    position_ids: torch.Tensor | None = None
    """[b, s], int64, 0 where a document begins; None: one document a sample."""
    dropout_keys: torch.Tensor | None = None
    """[b], int64; None without dropout."""
    document_offsets: torch.Tensor | None = None
    """[documents + 1], int32: where they begin in the b*s tokens, and b*s at the end."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose loss counts."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it may see: causal, within its document."""
        if self.position_ids is not None:
            return int((self.position_ids + 1).sum())
        num_samples, length = self.tokens.shape
        return num_samples * length * (length + 1) // 2

    def pipeline_inputs(self) -> tuple[torch.Tensor, ...]:
        """What the first stage takes, see `megagpt.model.pipeline.GPTStage`."""
        return tuple(tensor for tensor in self[:4] if tensor is not None)


class Batches:
    """The micro-batches of one data-parallel index, made ahead of the step that takes them.

    Attributes:
        wait_seconds: How long the last step waited for data, its own or the next one's.

    Args:
        datasets: By split.
        sampler: Which samples are this index's.
        training: The last step, the samples of an evaluation and the seed of dropout.
        data: What is masked.
        end_of_document: The token that ends documents; needed by masking only.
        has_dropout: Whether samples carry the keys of their masks.
        is_pinned: Whether a GPU copies them while it computes.
    """

    def __init__(
        self,
        datasets: dict[str, Dataset],
        sampler: BatchSampler,
        training: TrainingConfig,
        data: DataConfig,
        *,
        end_of_document: int | None,
        has_dropout: bool,
        is_pinned: bool = False,
    ) -> None:
        self.datasets = datasets
        self.sampler = sampler
        self._training = training
        self._data = data
        self.end_of_document = end_of_document
        self.has_dropout = has_dropout
        self.wait_seconds = 0.0
        # One thread: the next step's batches are read while this step computes.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[list[MicroBatch]]] | None = None
        self._is_pinned = is_pinned

    def training(self, consumed_samples: int, *, step: int) -> list[MicroBatch]:
        """The micro-batches of the step (from 1) that begins at consumed_samples."""
        begin = time.monotonic()
        place = (consumed_samples, step)
        if self._ahead is not None and self._ahead[0] == place:
            batches = self._ahead[1].result()
        else:
            batches = self._read_step(*place)
        self.wait_seconds = time.monotonic() - begin
        self._ahead = None
        if step < self._training.train_steps:
            following = (consumed_samples + self.sampler.global_batch_size, step + 1)
            self._ahead = (following, self._reader.submit(self._read_step, *following))
        return batches

    def num_tokens_ahead(self) -> int:
        """Valid tokens of this index's part of the next step, waited for; 0 after the last one.

        A read that fails counts as 0 too: its error belongs to the step that takes the batches.
        """
        if self._ahead is None:
            return 0
        begin = time.monotonic()
        has_failed = self._ahead[1].exception() is not None
        self.wait_seconds += time.monotonic() - begin
        return 0 if has_failed else sum(batch.num_tokens for batch in self._ahead[1].result())

    def num_evaluation_batches(self, split: str) -> int:
        """Micro-batches of an evaluation, as many on every rank."""
        at_once = self.sampler.micro_batch_size * self.sampler.dp_size
        return -(-self._num_evaluation_samples(split) // at_once)

    def evaluation(self, split: str) -> Iterator[MicroBatch]:
        """The micro-batches of an evaluation, as many on every rank."""
        dataset = self.datasets[split]
        for indices in self.sampler.evaluation_batches(self._num_evaluation_samples(split)):
            samples = np.full((len(indices), dataset.seq_length + 1), PAD, np.int64)
            used = [i for i in indices if i >= 0]  # padding stands at the end
            dataset.gather(used, out=samples[: len(used)])
            yield self._micro_batch(samples, indices, step=0)

    def _num_evaluation_samples(self, split: str) -> int:
        limit = self._training.samples_of_evaluation(self.sampler.global_batch_size)
        return min(len(self.datasets[split]), limit)

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def _read_step(self, consumed_samples: int, step: int) -> list[MicroBatch]:
        dataset = self.datasets["train"]
        return [
            self._micro_batch(dataset.gather(indices), indices, step=step)
            for indices in self.sampler.micro_batches(consumed_samples)
        ]

    def _micro_batch(self, samples: np.ndarray, indices: list[int], *, step: int) -> MicroBatch:
        """Tensors of samples [b, s + 1]."""
        data = self._data
        num_samples, length = len(samples), samples.shape[1] - 1
        buffer = torch.empty(
            (2 + data.document_masking, num_samples, length),
            dtype=torch.int64,
            pin_memory=self._is_pinned,
        )
        tokens, _ = tokens_to_batch(
            samples,
            masked_after=self.end_of_document if data.eod_mask_loss else None,
            out=buffer[:2].numpy(),
        )
        positions = keys = offsets = None
        if data.document_masking:
            assert self.end_of_document is not None
            positions = buffer[2]
            places, begins = document_boundaries(tokens, self.end_of_document)
            positions.numpy()[:] = places
            offsets = torch.from_numpy(begins)
            if self._is_pinned:
                offsets = offsets.pin_memory()
        if self.has_dropout:
            # In evaluation too, where nothing is dropped: a pipeline's messages keep their form.
            keys = dropout_keys(torch.tensor(indices), seed=self._training.seed, step=step)
        return MicroBatch(buffer[0], buffer[1], positions, keys, offsets)
