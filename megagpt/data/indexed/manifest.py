"""`<prefix>.manifest.json`: what a pair was made from, and what its bytes must be.

Megatron ignores the file, and pairs made by Megatron have none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.data.indexed.dataset import REMAKE, bin_path, idx_path, manifest_path
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.tokenizers.protocol import BYTE_TOKENIZER, Tokenizer
from megagpt.files import decode_json, encode_json, write_atomically

FORMAT_VERSION = 2
_PLACES = 10


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Fidelity:
    """What of the text the tokens do not give back; all 0 where it is whole."""

    lost_bytes: int = 0
    """UTF-8 bytes of the characters of which fewer come back than went in."""
    altered_documents: int = 0
    """Documents that do not come back exactly, be it by a space."""
    unknown_tokens: int = 0
    """Tokens that stand for what the tokenizer has none for."""
    first: tuple[str, ...] = ()
    """The first places, with what is missing there."""

    @property
    def is_whole(self) -> bool:
        """Whether every document comes back exactly."""
        return not (self.altered_documents or self.unknown_tokens)

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.lost_bytes + other.lost_bytes,
            self.altered_documents + other.altered_documents,
            self.unknown_tokens + other.unknown_tokens,
            (*self.first, *other.first)[:_PLACES],
        )


@dataclass(frozen=True)
class Manifest:
    """Facts of one .bin/.idx pair."""

    tokenizer_kind: str
    """`sentencepiece`, `huggingface` or `byte`."""
    tokenizer_path: str
    """What `load_tokenizer` opens; in the file a path relative to the manifest."""
    tokenizer_sha256: str
    """Hash of the tokenizer's content."""
    vocab_size: int
    """Tokens of the vocabulary."""
    eod: int
    """Token that ends each document."""
    dtype: str
    """Stored type of a token, as numpy names it."""
    num_tokens: int
    """Tokens, ends of documents included."""
    num_documents: int
    """Documents."""
    text_bytes: int | None
    """UTF-8 bytes of the text that was encoded, the divisor of bits per byte; None: not known."""
    largest_token: int
    """Largest token in .bin; -1 without tokens."""
    bin_bytes: int
    """Size of .bin."""
    idx_bytes: int
    """Size of .idx."""
    idx_sha256: str
    """Hash of .idx."""
    bin_crc32: tuple[int, ...]
    """CRC-32 of each CHECKSUM_BLOCK_BYTES of .bin."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Inputs left out, by reason."""
    sources: tuple[Source, ...] = ()
    """The input files."""
    fidelity: Fidelity | None = None
    """What the tokens do not give back; of a part of a pair, that of the pair; None: not known."""
    format_version: int = FORMAT_VERSION
    """Version of this file."""


def tokenizer_facts(tokenizer: Tokenizer | Manifest) -> dict[str, Any]:
    """The manifest's fields of a tokenizer, or of that of another manifest."""
    if isinstance(tokenizer, Manifest):
        names = ("tokenizer_kind", "tokenizer_path", "tokenizer_sha256", "vocab_size", "eod")
        return {name: getattr(tokenizer, name) for name in names}
    return {
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_path": tokenizer.path,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def publish_pair(writer: IndexedDatasetWriter, **facts: Any) -> Manifest:
    """Seals a pair and makes it appear together with its manifest.

    Args:
        writer: Of the pair.
        facts: The manifest's fields that the writer does not know.

    Returns:
        The manifest.
    """
    writer.seal()
    manifest = Manifest(
        **facts,
        dtype=writer.dtype.name,
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        largest_token=writer.largest_token,
        bin_bytes=writer.num_tokens * writer.dtype.itemsize,
        idx_bytes=writer.idx_bytes,
        idx_sha256=writer.idx_sha256,
        bin_crc32=tuple(writer.bin_crc32),
    )
    writer.publish(_encode(writer.prefix, manifest))
    return manifest


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes the manifest of a pair that is there, whole or not at all."""
    write_atomically(manifest_path(prefix), _encode(prefix, manifest))


def _encode(prefix: str | Path, manifest: Manifest) -> bytes:
    content = dataclasses.asdict(manifest)
    if manifest.tokenizer_kind != BYTE_TOKENIZER:
        directory = manifest_path(prefix).parent
        content["tokenizer_path"] = os.path.relpath(manifest.tokenizer_path, directory)
    return encode_json(content)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a pair, or None where there is none.

    Raises:
        ValueError: If it cannot be read, or .bin or .idx have another size than it says.
    """
    path = manifest_path(prefix)
    try:
        content = decode_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {REMAKE}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={version}, readable is {FORMAT_VERSION}; {REMAKE}"
        )
    try:
        content["sources"] = tuple(Source(**source) for source in content["sources"])
        if content.get("fidelity") is not None:
            given = content["fidelity"]
            content["fidelity"] = Fidelity(**given | {"first": tuple(given["first"])})
        content["bin_crc32"] = tuple(content["bin_crc32"])
        if content["tokenizer_kind"] != BYTE_TOKENIZER:
            joined = os.path.join(path.parent, content["tokenizer_path"])
            content["tokenizer_path"] = os.path.normpath(joined)
        manifest = Manifest(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not have the manifest's fields ({error}); {REMAKE}"
        ) from error
    for file, size in (
        (bin_path(prefix), manifest.bin_bytes),
        (idx_path(prefix), manifest.idx_bytes),
    ):
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"holds {actual} bytes"
            raise ValueError(f"{file} {found}, {path.name} says {size} bytes; {REMAKE}")
    return manifest


def require_one_tokenizer(
    manifests: Mapping[str, Manifest | None],
) -> tuple[str, Manifest] | None:
    """Checks that pairs were made with one tokenizer, as far as their manifests tell.

    Args:
        manifests: By prefix.

    Returns:
        The first pair that has a manifest, with it; None where none has.

    Raises:
        ValueError: If two differ.
    """
    known = [(prefix, manifest) for prefix, manifest in manifests.items() if manifest is not None]
    for prefix, manifest in known:
        first_prefix, first = known[0]
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"{prefix} was made with another tokenizer than {first_prefix} "
                f"({manifest.tokenizer_sha256[:12]}, {first.tokenizer_sha256[:12]}); preprocess "
                "both with one"
            )
        if manifest.eod != first.eod:
            raise ValueError(
                f"documents of {prefix} end with token {manifest.eod}, those of {first_prefix} "
                f"with {first.eod}; make both with one --eod"
            )
    return known[0] if known else None
