"""What `pipeline.py` measures against: SentencePiece and Megatron-LM, a process for each job.

Run by path with the name of a job and its arguments as JSON; the last line on stdout is the result
as JSON. Imports nothing of megagpt, so that any interpreter with the peer's packages can run it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

SEQ_LENGTH = 2048
"""Tokens that a sample predicts."""
SEED = 1234
"""Of the training order."""

_SHORTEST_SECONDS = 0.5


def probe() -> str:
    """Imports all that the jobs with Megatron need; returns the path of its datasets."""
    from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset

    assert helpers.build_blending_indices and indexed_dataset.IndexedDatasetBuilder
    return os.path.dirname(gpt_dataset.__file__)


def encode(text: str, tokenizer: str, part: int, num_parts: int) -> float:
    """CPU-seconds in which SentencePiece encodes every num_parts-th document; no JSON, no import.

    Args:
        text: JSONL file.
        tokenizer: SentencePiece model.
        part: Lines part, part + num_parts and so on are encoded.
        num_parts: Processes that share the file.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    with open(text, encoding="utf-8") as file:
        lines = (line for number, line in enumerate(file) if number % num_parts == part)
        documents = [json.loads(line)["text"] for line in lines]

    def encode_all() -> None:
        for document in documents:
            processor.encode(document)

    return cpu_seconds(encode_all)


def write_pair(ids: str, prefix: str, other: str, vocab_size: int) -> bool:
    """Writes a pair with Megatron's builder, and opens another of the same documents.

    Args:
        ids: JSON file with the tokens of each document, end of document included.
        prefix: Of the pair to write.
        other: Prefix of the pair to read.
        vocab_size: Decides the stored type, by Megatron's own rule.

    Returns:
        Whether Megatron reads the same documents from the other pair.
    """
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    with open(ids, encoding="utf-8") as file:
        documents = json.load(file)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    opened = IndexedDataset(other)
    return len(opened) == len(documents) and all(
        numpy.array_equal(opened[number], documents[number])
        for number in range(0, len(documents), max(len(documents) // 16, 1))
    )


def read_samples(prefix: str, samples: str, eod: int) -> float:
    """CPU-seconds a sample, of numbers in a .npy file, without masks.

    Args:
        prefix: Of the pair.
        samples: .npy file of sample numbers, all of the first epoch.
        eod: Token that ends a document.
    """
    return _read(prefix, samples, eod=eod, masks=False)


def read_masked_samples(prefix: str, samples: str, eod: int, count: int) -> float:
    """CPU-seconds a sample with positions, loss and attention mask reset at documents' ends.

    Args:
        prefix: Of the pair.
        samples: .npy file of sample numbers.
        eod: Token that ends a document.
        count: How many of them are read.
    """
    return _read(prefix, samples, eod=eod, masks=True, count=count)


def build_index(prefix: str, cache: str, num_samples: int) -> float:
    """CPU-seconds in which Megatron builds and keeps the order of a run.

    Args:
        prefix: Of the pair.
        cache: A fresh folder for the index.
        num_samples: Of the run.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(prefix)
    return cpu_seconds(lambda: _dataset(indexed, num_samples, cache=cache))


def build_blend(weights: list[float], count: int) -> float:
    """CPU-seconds in which Megatron builds a blend, as its BlendedDataset does.

    Args:
        weights: Of the members.
        count: Positions.
    """
    import numpy
    from megatron.core.datasets import helpers

    def build() -> None:
        members = numpy.zeros(count, dtype=numpy.int16)
        samples = numpy.zeros(count, dtype=numpy.int64)
        helpers.build_blending_indices(members, samples, weights, len(weights), count, False)

    return cpu_seconds(build)


def replay(cases: list[dict[str, Any]], out: str, vocab_size: int, directory: str) -> int:
    """Writes the samples that Megatron trains on in runs, to be compared.

    Args:
        cases: Of each run weights by prefix, seed, seq_length, num_samples and split.
        out: .npz file of [num_samples, seq_length + 1] tokens by the number of the case.
        vocab_size: Above all tokens.
        directory: Where Megatron may write.

    Returns:
        The number of runs.
    """
    import numpy
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    # Its blends ask for the rank of this process.
    meeting = f"file://{directory}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    samples = {}
    for number, case in enumerate(cases):
        prefixes = list(case["weights"])
        weights = list(case["weights"].values()) if len(prefixes) > 1 else None
        config = GPTDatasetConfig(
            random_seed=case["seed"],
            sequence_length=case["seq_length"],
            blend=(prefixes, weights),
            split=case["split"],
            path_to_cache=f"{directory}/megatron_cache",
            tokenizer=_Tokenizer(0),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [case["num_samples"], 0, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        dataset = builder.build()[0]
        rows = [dataset[row] for row in range(case["num_samples"])]
        samples[str(number)] = numpy.array(
            [numpy.append(row["tokens"], row["labels"][-1:]) for row in rows]
        )
    numpy.savez(out, **samples)
    return len(cases)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU-seconds of this process, user and system, in one call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def cpu_seconds_a_pass(function: Callable[[], Any]) -> float:
    """CPU-seconds of a call once all is warm: mean over the calls of half a second."""
    function()
    seconds, passes = 0.0, 0
    while seconds < _SHORTEST_SECONDS:
        seconds += cpu_seconds(function)
        passes += 1
    return seconds / passes


def _read(prefix: str, samples: str, *, eod: int, masks: bool, count: int | None = None) -> float:
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    torch.set_num_threads(1)  # as in a data loader's worker; more cost the peer more CPU-seconds
    indexed = IndexedDataset(prefix)
    num_tokens = int(indexed.sequence_lengths.sum(dtype=numpy.int64))
    dataset = _dataset(indexed, (num_tokens - 1) // SEQ_LENGTH, eod=eod, masks=masks)
    numbers = numpy.load(samples)[:count].tolist()

    def read_all() -> None:
        for number in numbers:
            dataset[number]

    return cpu_seconds_a_pass(read_all) / len(numbers)


class _Tokenizer:
    """The little that a GPTDataset asks of a tokenizer."""

    vocab_size = None
    unique_identifiers = {"class": "benchmark"}

    def __init__(self, eod: int) -> None:
        self.eod = eod


def _dataset(
    indexed: Any, num_samples: int, *, eod: int = 0, masks: bool = False, cache: str | None = None
) -> Any:
    import numpy
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        path_to_cache=cache,
        tokenizer=_Tokenizer(eod),
        reset_position_ids=masks,
        reset_attention_mask=masks,
        eod_mask_loss=masks,
        create_attention_mask=masks,
    )
    indices = numpy.arange(len(indexed), dtype=numpy.int32)
    return GPTDataset(indexed, indexed.path_prefix, indices, num_samples, Split.train, config)


_JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in (
        probe,
        encode,
        write_pair,
        read_samples,
        read_masked_samples,
        build_index,
        build_blend,
        replay,
    )
}

if __name__ == "__main__":
    print(json.dumps(_JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
