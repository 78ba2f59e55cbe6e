"""Loss, perplexity and bits per byte of a model on a split, every token scored once.

Windows of seq_length slide by `stride`; each scores only the tokens that no earlier one has scored,
so a token past the first window has at least seq_length - stride tokens of context. An end of
document stands before the split, as it does before documents in training, so the first token is
scored too.
"""

# b windows, s seq_length, n tokens of the split

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from megagpt.config.schema import Config, DataConfig
from megagpt.data.datasets import build_datasets, documents_of, split_sources
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.samples.masks import IGNORE_INDEX, document_boundaries, tokens_to_batch
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.model.gpt import GPTModel
from megagpt.monitor.metrics import perplexity
from megagpt.monitor.progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split."""

    loss: float
    """Nats per token, ends of documents included."""
    perplexity: float
    """exp(loss), per token."""
    bits_per_byte: float | None
    """All nats in bits, over the UTF-8 bytes of the text; comparable between tokenizers."""
    num_tokens: int
    """Tokens scored: all of the split, but what follows ends of documents under eod_mask_loss."""
    text_bytes: int | None
    """UTF-8 bytes of the text."""
    no_bits_per_byte: str | None = None
    """Why bits_per_byte is left out."""


def read_split(data: DataConfig, split: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int | None]:
    """Reads a split whole.

    Args:
        data: As the model was trained with.
        split: train, valid, test or valid-NAME.
        tokenizer: Gives the size of the text where the manifest does not (one pair for all splits).

    Returns:
        Its tokens, [n], int64, ends of documents included; and the UTF-8 bytes of its text, None
        where its tokens are not the whole text.

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
    text_bytes, is_whole = 0, True
    for source in sources[split]:
        indexed, manifest = IndexedDataset(source.prefix), read_manifest(source.prefix)
        if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{source.prefix} was made with another tokenizer than {tokenizer.path}; "
                "preprocess it again with that of the model"
            )
        if manifest is not None and manifest.fidelity is not None:
            is_whole = is_whole and manifest.fidelity.is_whole
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
    if tokenizer.unknown is not None and (tokens == tokenizer.unknown).any():
        is_whole = False
    return tokens, text_bytes if is_whole else None


def evaluate(
    model: GPTModel,
    tokens: np.ndarray,
    text_bytes: int | None,
    *,
    eod: int,
    stride: int,
    batch_size: int = 8,
    seen: DataConfig | None = None,
    report: Callable[[str], None] | None = None,
) -> Evaluation:
    """Scores all tokens of a split, with documents as the model was trained on them.

    Args:
        model: Whole, at tp = 1.
        tokens: [n], int64; n >= 1.
        text_bytes: UTF-8 bytes of the text that they stand for; None: they are not all of it.
        eod: Ends documents, and stands before the first token.
        stride: Tokens that each window after the first scores, 1 to seq_length.
        batch_size: Windows in one forward pass.
        seen: How the model was trained to see documents: document_masking and eod_mask_loss.
        report: Called with a line of progress every 10 seconds.

    Raises:
        ValueError: If stride is outside its range.
    """
    seen = seen or DataConfig()
    seq_length = model.config.seq_length
    if not 1 <= stride <= seq_length:
        raise ValueError(
            f"stride={stride} must lie between 1 and seq_length={seq_length}; give such a number"
        )
    all_tokens = np.concatenate([[eod], tokens])  # [n + 1]
    size = min(seq_length, len(tokens))
    ends = [size, *range(size + stride, len(tokens), stride)]
    if ends[-1] != len(tokens):
        ends.append(len(tokens))
    # Each of size tokens up to its end, with the first position that is scored.
    windows = [(e - size, b - (e - size)) for b, e in zip([0, *ends[:-1]], ends, strict=True)]

    def batch(first: int) -> tuple[np.ndarray, list[int]]:
        chosen = windows[first : first + batch_size]
        samples = np.stack([all_tokens[start : start + size + 1] for start, _ in chosen])
        return samples, [scored_from for _, scored_from in chosen]

    total, num_tokens = _nats(
        model,
        map(batch, range(0, len(windows), batch_size)),
        eod=eod,
        seen=seen,
        progress=Progress("evaluated", len(windows), report),
    )
    reason = None
    if text_bytes is None:
        reason = "the tokens do not give the whole text back, see megagpt data inspect"
    elif seen.eod_mask_loss:
        reason = "eod_mask_loss leaves the first token of each document out"
    return _evaluation(total, num_tokens, text_bytes, reason)


def validate(
    model: GPTModel,
    config: Config,
    split: str,
    *,
    eod: int,
    batch_size: int = 8,
    report: Callable[[str], None] | None = None,
) -> Evaluation:
    """The loss over the windows of the run's own validation, which it logs.

    Args:
        model: Whole, at tp = 1.
        config: Of the run.
        split: valid, valid-NAME or test.
        eod: Ends documents.
        batch_size: Windows in one forward pass.
        report: Called with a line of progress every 10 seconds.

    Raises:
        ValueError: If the run has no such split, or it is training's, whose windows are drawn.
    """
    datasets = build_datasets(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
        train_samples=config.training.train_steps * config.batch.global_batch_size,
    )
    names = [name for name in datasets if name != "train"]
    if split not in names:
        raise ValueError(
            f"the run validates on no {split} data; choose --split from "
            f"{', '.join(names) or 'none'}"
        )
    dataset = datasets[split]
    limit = config.training.samples_of_evaluation(config.batch.global_batch_size)
    count = min(len(dataset), limit)

    def batch(first: int) -> tuple[np.ndarray, list[int]]:
        chosen = list(range(first, min(first + batch_size, count)))
        return dataset.gather(chosen), [0] * len(chosen)

    total, num_tokens = _nats(
        model,
        map(batch, range(0, count, batch_size)),
        eod=eod,
        seen=config.data,
        progress=Progress("evaluated", count, report),
    )
    reason = "the windows of a validation need not be the whole text"
    return _evaluation(total, num_tokens, None, reason)


@torch.no_grad()
def _nats(
    model: GPTModel,
    batches: Iterable[tuple[np.ndarray, list[int]]],
    *,
    eod: int,
    seen: DataConfig,
    progress: Progress,
) -> tuple[float, int]:
    """Nats of samples [b, s + 1], each scored from a position on; and of how many tokens."""
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for samples, scored_from in batches:
        inputs, labels = tokens_to_batch(samples, masked_after=eod if seen.eod_mask_loss else None)
        for row, begin in enumerate(scored_from):
            labels[row, :begin] = IGNORE_INDEX
        positions = None
        if seen.document_masking:
            positions = torch.from_numpy(document_boundaries(inputs, eod)[0]).to(device)
        losses = model(
            torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device), positions
        )  # [b, s]
        total += losses.sum(dtype=torch.float64).item()
        num_tokens += int((labels != IGNORE_INDEX).sum())
        progress.add(len(samples))
    return total, num_tokens


def _evaluation(
    total: float, num_tokens: int, text_bytes: int | None, reason: str | None
) -> Evaluation:
    loss = total / num_tokens if num_tokens else math.nan
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=None if reason or not text_bytes else total / math.log(2) / text_bytes,
        num_tokens=num_tokens,
        text_bytes=text_bytes,
        no_bits_per_byte=reason,
    )
