"""Looks into training data: inspect, verify, merge, split, adopt, blend, locate."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from megagpt.config.command_line import parse_config
from megagpt.data.datasets import data_tokenizer_path, first_manifest
from megagpt.data.describe import (
    blend_shares,
    draw_histogram,
    histogram_lines,
    length_histogram,
    locate,
)
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.indexed.rewrite import adopt, ends_with_eod, merge, split
from megagpt.data.indexed.verify import verify
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.data.tokenizers.protocol import Tokenizer

_RUN_OPTIONS = "the run's own options follow: --config RUN.yaml, --SECTION.KEY VALUE"


def main(options: argparse.Namespace) -> None:
    """Runs one of the commands."""
    options.run(options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands and the flags of each."""
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="counts, lengths and some documents of a pair")
    command.add_argument("prefix")
    command.add_argument("--documents", type=int, default=3, help="documents to show")
    command.add_argument("--first", type=int, default=0, help="first document to show")
    command.add_argument("--characters", type=int, default=300, help="of each document")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the lengths")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="read pairs whole, compare with their manifests")
    command.add_argument("prefix", nargs="+")
    command.add_argument("--vocab_size", type=int, help="bound of the tokens, without a manifest")
    command.set_defaults(run=_verify)

    command = commands.add_parser("merge", help="one pair of several")
    command.add_argument("output_prefix")
    command.add_argument("inputs", nargs="+", metavar="prefix")
    command.set_defaults(run=_merge)

    command = commands.add_parser("split", help="pairs _train, _valid and _test of one")
    command.add_argument("prefix")
    command.add_argument("output_prefix")
    command.add_argument("--shares", default="969,30,1", help="of the documents")
    command.set_defaults(run=_split)

    command = commands.add_parser("adopt", help="write the manifest of a pair made elsewhere")
    command.add_argument("prefix")
    command.add_argument("--tokenizer", required=True, help="the one that it was made with")
    command.add_argument("--eod", metavar="TOKEN", help="what ends documents; default: its own")
    command.set_defaults(run=_adopt)

    command = commands.add_parser(
        "blend", help="what each pair gives to a run", epilog=_RUN_OPTIONS
    )
    command.set_defaults(run=_blend, takes_rest=True)

    command = commands.add_parser("locate", help="a step's documents", epilog=_RUN_OPTIONS)
    command.add_argument("--step", type=int, required=True, help="optimizer step, from 1")
    command.add_argument("--characters", type=int, default=80, help="of each document's text")
    command.set_defaults(run=_locate, takes_rest=True)


def _inspect(options: argparse.Namespace) -> None:
    indexed, manifest = IndexedDataset(options.prefix), read_manifest(options.prefix)
    print(f"{options.prefix}: {indexed.num_documents} documents, {indexed.num_sequences} sequences")
    print(f"tokens: {indexed.num_tokens} of {indexed.dtype.name}")
    tokenizer: Tokenizer | None = None
    if manifest is None:
        print("no manifest: megagpt data adopt writes one, to see text and to be verified")
    else:
        print(f"tokenizer: {manifest.tokenizer_kind} {manifest.tokenizer_path}")
        print(f"vocabulary: {manifest.vocab_size}, end of document: {manifest.eod}")
        for reason, count in manifest.skipped.items():
            print(f"left out: {count} {reason}")
        if manifest.fidelity is not None and not manifest.fidelity.is_whole:
            print(f"text that does not come back: {manifest.fidelity}")
        for source in manifest.sources:
            print(f"from: {source.path}, {source.num_bytes} bytes, sha256 {source.sha256}")
        tokenizer = load_tokenizer(manifest.tokenizer_path, eod=manifest.eod)
    bins = length_histogram(indexed)
    print("\n".join(histogram_lines(bins)))
    if options.picture is not None:
        draw_histogram(bins, f"{Path(options.prefix).name}: lengths of documents", options.picture)
    last = min(options.first + options.documents, indexed.num_documents)
    for number in range(options.first, last):
        tokens = indexed.document(number)
        print(f"document {number}, {len(tokens)} tokens: {_shown(tokens, tokenizer, options)}")


def _verify(options: argparse.Namespace) -> None:
    for prefix in options.prefix:
        manifest = verify(prefix, vocab_size=options.vocab_size)
        against = "its manifest" if manifest is not None else "its index (it has no manifest)"
        print(f"{prefix}: sound, compared with {against}")


def _merge(options: argparse.Namespace) -> None:
    _print_made([merge(options.inputs, options.output_prefix)])


def _split(options: argparse.Namespace) -> None:
    _print_made(split(options.prefix, options.shares, options.output_prefix).values())


def _adopt(options: argparse.Namespace) -> None:
    manifest = adopt(options.prefix, options.tokenizer, eod=options.eod)
    share = ends_with_eod(IndexedDataset(options.prefix), manifest.eod)
    print(
        f"{options.prefix}: manifest written; {share:.0%} of the documents end with token "
        f"{manifest.eod}, which document masking needs"
    )


def _blend(options: argparse.Namespace) -> None:
    config, _, _ = parse_config(options.rest)
    for prefix, weight, num_samples, epochs in blend_shares(config):
        print(
            f"{prefix}: weight={weight:.6f} samples={num_samples} "
            f"tokens={num_samples * config.model.seq_length} epochs={epochs:.3f}"
        )


def _locate(options: argparse.Namespace) -> None:
    config, _, _ = parse_config(options.rest)
    path, manifest = data_tokenizer_path(config.data), first_manifest(config.data)
    eod = manifest.eod if manifest is not None else None
    tokenizer = load_tokenizer(path, eod=eod) if path is not None else None
    for piece in locate(config, options.step):
        print(
            f"sample {piece.sample} row {piece.row}: {piece.prefix} document {piece.document} "
            f"tokens {piece.offset} to {piece.offset + len(piece.tokens)}: "
            f"{_shown(piece.tokens, tokenizer, options)}"
        )


def _print_made(pairs: Iterable[IndexedDataset]) -> None:
    for each in pairs:
        print(f"{each.prefix}: {each.num_documents} documents, {each.num_tokens} tokens")


def _shown(tokens, tokenizer: Tokenizer | None, options: argparse.Namespace) -> str:
    # No token stands for no character, but control symbols, which have no text.
    ids = tokens[: options.characters].tolist()
    if tokenizer is None:
        return " ".join(map(str, ids))
    text = tokenizer.decode(ids)
    return repr(text[: options.characters] + ("…" if len(text) > options.characters else ""))
