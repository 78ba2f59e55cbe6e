"""New pairs from existing ones: merged, split by documents, or adopted from another trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.data.indexed.dataset import IndexedDataset, bin_path, idx_path, manifest_path
from megagpt.data.indexed.manifest import (
    Fidelity,
    Manifest,
    publish_pair,
    read_manifest,
    require_one_tokenizer,
    tokenizer_facts,
    write_manifest,
)
from megagpt.data.indexed.splits import SPLITS, split_bounds
from megagpt.data.indexed.verify import checksums, verify
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.files import file_sha256

_COPY_ITEMS = 1 << 20


def merge(inputs: Sequence[str | Path], output_prefix: str | Path) -> IndexedDataset:
    """One pair of the documents of several, in order.

    Args:
        inputs: Prefixes of pairs of one dtype and, where they have manifests, one tokenizer.
        output_prefix: Path of the new pair; it gets a manifest if all inputs have one.

    Raises:
        ValueError: If the inputs do not fit together, or one is damaged or the output.
    """
    _require_other_output(inputs, output_prefix)
    opened = [IndexedDataset(prefix) for prefix in inputs]
    manifests = [read_manifest(prefix) for prefix in inputs]
    for indexed in opened:
        if indexed.dtype != opened[0].dtype:
            raise ValueError(
                f"{indexed.prefix} stores {indexed.dtype}, {opened[0].prefix} {opened[0].dtype}; "
                "preprocess both with one tokenizer"
            )
    require_one_tokenizer(dict(zip(map(str, inputs), manifests, strict=True)))
    with IndexedDatasetWriter(output_prefix, opened[0].dtype) as writer:
        for indexed in opened:
            _copy(indexed, range(indexed.num_documents), writer)
        known = [manifest for manifest in manifests if manifest is not None]
        if len(known) == len(manifests):
            skipped = sum((Counter(manifest.skipped) for manifest in known), Counter[str]())
            sizes = [manifest.text_bytes for manifest in known]
            publish_pair(
                writer,
                **tokenizer_facts(known[0]),
                fidelity=_sum_of(known),
                text_bytes=None if None in sizes else sum(size or 0 for size in sizes),
                skipped=dict(skipped),
                sources=tuple(source for manifest in known for source in manifest.sources),
            )
    return IndexedDataset(output_prefix)


def split(prefix: str | Path, shares: str, output_prefix: str | Path) -> dict[str, IndexedDataset]:
    """Pairs `<output_prefix>_train`, `_valid` and `_test` of contiguous documents of one.

    Args:
        prefix: The pair.
        shares: As `data.split`, such as `969,30,1`; a share of 0 gives no pair.
        output_prefix: Beginning of the new pairs' paths.

    Raises:
        ValueError: If the pair is damaged, or the shares give a split no document.
    """
    indexed, manifest = IndexedDataset(prefix), read_manifest(prefix)
    bounds = split_bounds(shares, indexed.num_documents)
    asked = zip(SPLITS, bounds, shares.split(","), strict=False)
    wanted = {name: range(*each) for name, each, share in asked if float(share) > 0}
    for name, documents in wanted.items():
        if not documents:
            raise ValueError(
                f"--shares={shares} gives {name} 0 of the {indexed.num_documents} documents of "
                f"{prefix}; give it a larger share or 0"
            )
    made = {}
    for name, documents in wanted.items():
        target = f"{output_prefix}_{name}"
        _require_other_output([prefix], target)
        with IndexedDatasetWriter(target, indexed.dtype) as writer:
            _copy(indexed, documents, writer)
            if manifest is not None:
                # How many bytes of text these documents have, only decoding would tell.
                facts = tokenizer_facts(manifest)
                publish_pair(
                    writer,
                    **facts,
                    text_bytes=None,
                    fidelity=manifest.fidelity,
                    sources=manifest.sources,
                )
        made[name] = IndexedDataset(target)
    return made


def adopt(prefix: str | Path, tokenizer_path: str | Path, *, eod: str | None = None) -> Manifest:
    """Writes the manifest of a pair that another trainer made.

    Args:
        prefix: The pair.
        tokenizer_path: The tokenizer that it was made with, see `load_tokenizer`.
        eod: Name of the token that ends documents; default: what the tokenizer says.

    Raises:
        ValueError: If it has a manifest, is damaged, or cannot be of that tokenizer.
    """
    if manifest_path(prefix).is_file():
        raise ValueError(f"{manifest_path(prefix)} exists; remove it to have it written anew")
    tokenizer = load_tokenizer(tokenizer_path, eod=eod)
    verify(prefix, vocab_size=tokenizer.vocab_size)
    indexed = IndexedDataset(prefix)
    bin_crc32, largest_token = checksums(indexed)
    manifest = Manifest(
        **tokenizer_facts(tokenizer),
        dtype=indexed.dtype.name,
        num_tokens=indexed.num_tokens,
        num_documents=indexed.num_documents,
        text_bytes=None,
        largest_token=largest_token,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=file_sha256(idx_path(prefix)),
        bin_crc32=bin_crc32,
    )
    write_manifest(prefix, manifest)
    return manifest


def ends_with_eod(indexed: IndexedDataset, eod: int) -> float:
    """Share of the documents with text, among the first thousand, that end with a token."""
    last = [
        int(document[-1])
        for document in (indexed.document(i) for i in range(min(1000, indexed.num_documents)))
        if len(document)
    ]
    return sum(token == eod for token in last) / max(len(last), 1)


def _sum_of(manifests: Sequence[Manifest]) -> Fidelity | None:
    """What all do not give back; not known where one does not know and no other has lost any."""
    known = [manifest.fidelity for manifest in manifests if manifest.fidelity is not None]
    total = sum(known, Fidelity())
    return total if len(known) == len(manifests) or not total.is_whole else None


def _copy(indexed: IndexedDataset, documents: range, writer: IndexedDatasetWriter) -> None:
    indexed.require_sound(documents)
    first, last = indexed.sequence_bounds(documents.start, documents.stop)
    begin = indexed.num_tokens_between(0, first)
    end = begin + indexed.num_tokens_between(first, last)
    for start in range(begin, end, _COPY_ITEMS):
        writer.add_tokens(np.asarray(indexed.tokens[start : min(start + _COPY_ITEMS, end)]))
    bounds = indexed.document_indices[documents.start : documents.stop + 1]
    writer.add_lengths(np.asarray(indexed.sequence_lengths[first:last]), np.diff(bounds))


def _require_other_output(inputs: Sequence[str | Path], output: str | Path) -> None:
    for prefix in inputs:
        if bin_path(prefix).resolve() == bin_path(output).resolve():
            raise ValueError(f"{output} is an input too; name another output prefix")
