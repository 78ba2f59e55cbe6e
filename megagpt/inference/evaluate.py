"""Loss, perplexity and bits per byte of a model on a split, every token scored once.

Windows of seq_length slide by `stride`; each scores only the tokens that no earlier one has scored,
so a token past the first window has at least seq_length - stride tokens of context. An end of
document stands before the split, as it does before documents in training, so the first token is
scored too.
"""

# b windows, s seq_length, n tokens of the split

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megagpt.config.schema import DataConfig
from megagpt.data.datasets import documents_of, split_sources
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.model.gpt import GPTModel
from megagpt.monitor.metrics import perplexity

_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split."""

    loss: float
    """Nats per token, ends of documents included."""
    perplexity: float
    """exp(loss), per token."""
    bits_per_byte: float
    """All nats in bits, over the UTF-8 bytes of the text; comparable between tokenizers."""
    num_tokens: int
    """Tokens scored: all of the split."""
    text_bytes: int
    """UTF-8 bytes of the text."""


def read_split(data: DataConfig, split: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Reads a split whole.

    Args:
        data: As the model was trained with.
        split: train, valid, test or valid-NAME.
        tokenizer: Gives the size of the text where the manifest does not (one pair for all splits).

    Returns:
        Its tokens, [n], int64, ends of documents included; and the UTF-8 bytes of its text.

    Raises:
        ValueError: If the split is not configured, empty, or of another tokenizer.
    """
    sources = split_sources(data)
    if split not in sources:
        raise ValueError(
            f"the run has no {split} data; choose --split from {', '.join(sources)}, or train "
            f"with --data.{split}_path"
        )
    documents: list[np.ndarray] = []
    text_bytes = 0
    for source in sources[split]:
        indexed, manifest = IndexedDataset(source.prefix), read_manifest(source.prefix)
        if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{source.prefix} was made with another tokenizer than {tokenizer.path}; "
                "preprocess it again with that of the model"
            )
        used = documents_of(data, split, source, indexed.num_documents)
        own = [indexed.document(i).astype(np.int64) for i in used]
        documents += own
        known = manifest.text_bytes if manifest is not None else None
        if known is not None and len(used) == indexed.num_documents:
            text_bytes += known
        else:
            text_bytes += sum(
                len(tokenizer.decode(d[d != tokenizer.eod].tolist()).encode()) for d in own
            )
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int64)
    if len(tokens) == 0 or text_bytes == 0:
        names = ", ".join(source.prefix for source in sources[split])
        raise ValueError(f"the {split} split of {names} is empty; choose another --split")
    return tokens, text_bytes


@torch.no_grad()
def evaluate(
    model: GPTModel,
    tokens: np.ndarray,
    text_bytes: int,
    *,
    eod: int,
    stride: int,
    batch_size: int = 8,
    report: Callable[[str], None] | None = None,
) -> Evaluation:
    """Scores all tokens of a split.

    Args:
        model: Whole, at tp = 1.
        tokens: [n], int64; n >= 1.
        text_bytes: UTF-8 bytes of the text that they stand for.
        eod: Stands before the first token.
        stride: Tokens that each window after the first scores, 1 to seq_length.
        batch_size: Windows in one forward pass.
        report: Called with a line of progress every 10 seconds.

    Raises:
        ValueError: If stride is outside its range.
    """
    seq_length = model.config.seq_length
    if not 1 <= stride <= seq_length:
        raise ValueError(
            f"stride={stride} must lie between 1 and seq_length={seq_length}; give such a number"
        )
    num_tokens = len(tokens)
    inputs = np.concatenate([[eod], tokens[:-1]])  # [n]; inputs[i] stands before tokens[i]
    size = min(seq_length, num_tokens)
    ends = [size, *range(size + stride, num_tokens, stride)]
    if ends[-1] != num_tokens:
        ends.append(num_tokens)
    # Each of size tokens up to its end, with the first position that is scored.
    windows = [(e - size, b - (e - size)) for b, e in zip([0, *ends[:-1]], ends, strict=True)]
    device = next(model.parameters()).device
    total, begin, reported = 0.0, time.monotonic(), time.monotonic()
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        batch_inputs = np.stack([inputs[start : start + size] for start, _ in batch])
        labels = np.stack([tokens[start : start + size] for start, _ in batch])  # [b, s]
        for row, (_, num_scored_before) in enumerate(batch):
            labels[row, :num_scored_before] = IGNORE_INDEX
        losses = model(
            torch.from_numpy(batch_inputs).to(device), torch.from_numpy(labels).to(device)
        )  # [b, s]
        total += losses.sum(dtype=torch.float64).item()
        now = time.monotonic()
        if report is not None and now - reported > _REPORT_SECONDS:
            reported, share = now, (first + len(batch)) / len(windows)
            report(
                f"evaluated {share:.0%} of {num_tokens} tokens, "
                f"{(now - begin) * (1 - share) / share:.0f} s left"
            )
    loss = total / num_tokens
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=total / math.log(2) / text_bytes,
        num_tokens=num_tokens,
        text_bytes=text_bytes,
    )
