"""Samples of seq_length + 1 tokens, in an order that (seed, epoch, data) alone fix.

Sample i does not depend on how long the run is, on the batch or on the number of ranks, so a longer
run keeps what it has seen (`order.py`). Which rank takes which sample is the sampler's business
(`sampler.py`); several pairs become one training set in `blended_dataset.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed.dataset import IndexedDataset, bin_path, dtype_code
from megagpt.data.native import address, load_native
from megagpt.data.samples.index_cache import cached_index, pair_identity
from megagpt.data.samples.order import SAMPLES_PER_MARK, SampleIndex, epoch_index, megatron_index

PAD = -1
"""Stands where a sample has no token."""
_AHEAD = 0.9
"""Share of an epoch after which the order of the next one is built."""
_NEGATIVE = 2**63 - 1  # what the readers take a negative token for


@dataclass(frozen=True)
class MegatronOrder:
    """What Megatron's order depends on, beside data and seed."""

    sequences: range
    """Those of the split; Megatron splits sequences, not documents."""
    num_samples: int
    """Samples that the run asks of this pair."""


class GPTDataset:
    """Fixed-length samples of a stream of documents.

    With `shuffle=False` the order is that of the file, there is one epoch, and the last sample is
    padded with PAD, so that every token but the first is scored.

    Args:
        indexed: The pair.
        documents: Those of this split.
        seq_length: Tokens that a sample predicts.
        seed: Seed of the order.
        shuffle: Training order (endless epochs) or evaluation order.
        name: Split, for messages.
        cache: Folder where indices are kept; None: in memory only.
        vocab_size: Bound of the tokens; None knows none.
        megatron: Replay Megatron's order; None: our own.
        builds_ahead: Build the order of the next epoch near the end of one, beside what reads.

    Raises:
        ValueError: If the documents do not fill one sample (in evaluation: have under 2 tokens), or
            the pair is damaged.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        *,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        name: str = "train",
        cache: Path | None = None,
        vocab_size: int | None = None,
        megatron: MegatronOrder | None = None,
        builds_ahead: bool = False,
    ) -> None:
        self.indexed = indexed
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self._cache = cache
        self.megatron = megatron
        self.sequences = (
            megatron.sequences
            if megatron is not None
            else range(*indexed.sequence_bounds(documents.start, documents.stop))
        )
        self.num_tokens = indexed.num_tokens_between(self.sequences.start, self.sequences.stop)
        needed = seq_length + 1 if shuffle and megatron is None else 2
        if self.num_tokens < needed:
            raise ValueError(
                f"model.seq_length={seq_length} needs at least {needed} tokens in the "
                f"{name} split, {indexed.prefix} has {self.num_tokens} there in "
                f"{len(documents)} documents; give more text, a larger share in "
                "--data.split or a smaller --model.seq_length"
            )
        whole, rest = divmod(self.num_tokens - 1, seq_length)
        self.samples_per_epoch = whole if shuffle else whole + (rest > 0)
        # All that the order depends on, but the epoch.
        self._order_key: dict[str, Any] = {
            "data": pair_identity(indexed),
            "documents": [documents.start, documents.stop],
            "sequences": [self.sequences.start, self.sequences.stop],
            "seq_length": seq_length,
            "seed": seed,
            "shuffle": shuffle,
            "megatron_samples": megatron.num_samples if megatron else None,
        }
        self._epochs: dict[int, SampleIndex] = {}
        self._builds_ahead = builds_ahead and shuffle and megatron is None
        self._ahead: dict[int, Future[SampleIndex]] = {}
        self._epoch(0)  # a damaged index is found before training
        if megatron is not None:
            self.samples_per_epoch = len(self._epoch(0).order)

    def __len__(self) -> int:
        """Samples of one epoch; in training order higher indices go on into the next epochs."""
        return self.samples_per_epoch

    def __iter__(self) -> Iterator[np.ndarray]:
        """The samples of the first epoch."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        """One sample: [seq_length + 1], int64; see `gather`."""
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples, assembled in one go.

        Args:
            indices: Sample numbers, in any order and of any epoch.
            out: [len(indices), seq_length + 1], int64, contiguous, to fill; default: a new one.

        Returns:
            out; PAD where the evaluation stream has ended.

        Raises:
            IndexError: If an index is negative, or past the one epoch of evaluation.
            ValueError: If a token is not in the vocabulary, or the pair is damaged.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        shape = (len(numbers), self.seq_length + 1)
        if out is None:
            out = np.empty(shape, dtype=np.int64)
        assert out.shape == shape and out.dtype == np.int64, f"out must be int64 of {shape}"
        epochs, positions = np.divmod(numbers, self.samples_per_epoch)
        is_endless = self.shuffle and self.megatron is None
        if len(numbers) and (epochs.min() < 0 or (not is_endless and epochs.max() > 0)):
            raise IndexError(f"samples {numbers.min()} to {numbers.max()} of {len(self)}")
        if len(numbers) and epochs.min() == epochs.max():
            largest = self._fill(self._epoch(int(epochs[0])), positions, out)
        else:
            largest = PAD
            for epoch in np.unique(epochs).tolist():
                rows = np.flatnonzero(epochs == epoch)
                part = np.empty((len(rows), out.shape[1]), dtype=np.int64)
                largest = max(largest, self._fill(self._epoch(epoch), positions[rows], part))
                out[rows] = part
        if self._builds_ahead and len(numbers):
            if positions[-1] >= _AHEAD * self.samples_per_epoch:
                self._build_ahead(int(epochs[-1]) + 1)
        if self.vocab_size is not None and largest >= self.vocab_size:
            token = "a negative token" if largest == _NEGATIVE else f"token {largest}"
            raise ValueError(
                f"{bin_path(self.indexed.prefix)} holds {token}, the vocabulary ends at "
                f"{self.vocab_size - 1}, so it is damaged or of another tokenizer; check it with "
                "megagpt data verify"
            )
        return out

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """What a sample is made of: sequence, first token in it and number of tokens, in order."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._pieces(self._epoch(epoch), position)

    def _pieces(self, index: SampleIndex, position: int) -> list[tuple[int, int, int]]:
        number = int(index.order[position])
        if number >= len(index.order):
            self._raise_damaged()
        mark, after = divmod(number, SAMPLES_PER_MARK)
        place, skip = (int(value) for value in index.marks[mark])
        skip += after * self.seq_length
        pieces: list[tuple[int, int, int]] = []
        left = self.seq_length + 1
        while left and place < len(index.sequences):
            sequence = int(index.sequences[place])
            if sequence >= self.indexed.num_sequences:
                self._raise_damaged()
            length = int(self.indexed.sequence_lengths[sequence])
            pointer = int(self.indexed.sequence_pointers[sequence])
            last = self.indexed.num_tokens - length
            first, rest = divmod(pointer, self.indexed.dtype.itemsize)
            if length < 0 or pointer < 0 or rest or first > last:
                self._raise_damaged()
            if skip >= length:
                skip -= length
            else:
                pieces.append((sequence, skip, min(left, length - skip)))
                left -= pieces[-1][2]
                skip = 0
            place += 1
        return pieces

    def _fill(self, index: SampleIndex, positions: np.ndarray, out: np.ndarray) -> int:
        """Fills rows with samples of one epoch; returns the largest token."""
        library = load_native()
        if library is None:
            return self._fill_in_python(index, positions, out)
        indexed = self.indexed
        largest = library.megagpt_gather(
            indexed.tokens_address,
            indexed.num_tokens,
            dtype_code(indexed.dtype),
            indexed.dtype.itemsize,
            indexed.lengths_address,
            indexed.pointers_address,
            indexed.num_sequences,
            address(index.sequences),
            len(index.sequences),
            address(index.order),
            len(index.order),
            address(index.marks),
            SAMPLES_PER_MARK,
            address(positions),
            len(positions),
            self.seq_length,
            PAD,
            address(out),
        )
        if largest < PAD:
            self._raise_damaged()
        return largest

    def _fill_in_python(self, index: SampleIndex, positions: np.ndarray, out: np.ndarray) -> int:
        indexed = self.indexed
        out[:] = PAD
        is_negative = False
        for row, position in zip(out, positions, strict=True):
            filled = 0
            for sequence, skip, count in self._pieces(index, int(position)):
                row[filled : filled + count] = indexed[sequence][skip : skip + count]
                filled += count
            is_negative = is_negative or bool(filled and row[:filled].min() < 0)
        if is_negative:
            return _NEGATIVE
        return int(out.max(initial=PAD))

    def _raise_damaged(self) -> None:
        raise ValueError(
            f"the index of {self.indexed.prefix} points outside of its tokens, so it is damaged; "
            "check it with megagpt data verify"
        )

    def _epoch(self, number: int) -> SampleIndex:
        if number not in self._epochs:
            ahead = self._ahead.pop(number, None)
            index = self._index_of(number) if ahead is None else ahead.result()
            # A batch may straddle two epochs; older ones are not needed again.
            self._epochs = {n: order for n, order in self._epochs.items() if n == number - 1}
            self._epochs[number] = index
        return self._epochs[number]

    def _index_of(self, number: int) -> SampleIndex:
        num_samples = self.megatron.num_samples if self.megatron else self.samples_per_epoch
        return cached_index(
            self._cache,
            {**self._order_key, "epoch": number},
            lambda: self._build_epoch(number),
            num_bytes=4 * (len(self.sequences) + num_samples),
        )

    def _build_ahead(self, number: int) -> None:
        """Builds the order of an epoch beside training: no step need wait for it."""
        if number in self._epochs or number in self._ahead:
            return
        future: Future[SampleIndex] = Future()
        self._ahead[number] = future

        def build() -> None:
            try:
                future.set_result(self._index_of(number))
            except BaseException as error:  # raised by the step that needs it
                future.set_exception(error)

        # A daemon: the end of a run waits for no epoch that it does not reach.
        threading.Thread(target=build, name=f"epoch {number}", daemon=True).start()

    def _build_epoch(self, number: int) -> SampleIndex:
        if self.megatron is not None:
            return megatron_index(
                self.indexed,
                self.sequences,
                seq_length=self.seq_length,
                seed=self.seed,
                num_samples=self.megatron.num_samples,
            )
        return epoch_index(
            self.indexed,
            self.documents,
            seq_length=self.seq_length,
            seed=self.seed,
            epoch=number,
            shuffle=self.shuffle,
        )
