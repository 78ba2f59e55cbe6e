"""Cleaning a corpus: word shingles, near-duplicates and passages shared with held-out text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

SHINGLE_WORDS = 8

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_PASSAGE_BREAK = "\n\n"


def shingles(text: str) -> set[str]:
    """All runs of SHINGLE_WORDS words, without case and punctuation."""
    words = _WORD.findall(text.lower())
    starts = range(len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}


def find_near_duplicates(
    texts: Mapping[str, str], *, largest_share: float
) -> dict[str, tuple[str, float]]:
    """Documents that repeat a longer one.

    Args:
        texts: Documents by name.
        largest_share: Share of a document's shingles that it may have in common with a longer one.

    Returns:
        For each document to drop, the longer document and the share in common.
    """
    kept: dict[str, set[str]] = {}
    dropped: dict[str, tuple[str, float]] = {}
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        own = shingles(texts[name])
        shares = {
            other: len(own & theirs) / max(len(own), 1)  # a text of under 8 words has none
            for other, theirs in kept.items()
        }
        worst = max(shares, key=lambda other: shares[other], default=None)
        if worst is not None and shares[worst] > largest_share:
            dropped[name] = (worst, shares[worst])
        else:
            kept[name] = own
    return dropped


def remove_shared_passages(text: str, held_out: Collection[str]) -> tuple[str, list[str]]:
    """Takes out every passage (between blank lines) that holds a shingle of the held-out text.

    Args:
        text: A training document.
        held_out: Shingles of the held-out text.

    Returns:
        The rest of the text, and the passages taken out.
    """
    kept: list[str] = []
    removed: list[str] = []
    for passage in text.split(_PASSAGE_BREAK):
        shared = any(shingle in held_out for shingle in shingles(passage))
        (removed if shared else kept).append(passage)
    return _PASSAGE_BREAK.join(kept), removed
