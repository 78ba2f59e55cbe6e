"""What becomes of documents that cannot be encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NO_TEXT = "no text"
"""Reason of an empty document, which is no fault."""

OnError = Literal["fail", "skip"]


@dataclass(frozen=True)
class FaultPolicy:
    """What becomes of documents that cannot be encoded."""

    on_error: OnError = "fail"
    """`fail` stops at the first, `skip` leaves them out and counts them."""
    largest_skipped_share: float = 0.01
    """With `skip`: share of bad documents above which no pair is made."""

    def __post_init__(self) -> None:
        """Checks the range."""
        if not 0 <= self.largest_skipped_share <= 1:
            raise ValueError(
                f"largest_skipped_share={self.largest_skipped_share} must lie between 0 and 1; "
                "give such a share"
            )

    def require_acceptable(self, skipped: Mapping[str, int], num_documents: int) -> None:
        """Checks the whole.

        Args:
            skipped: Documents left out, by reason.
            num_documents: Those that are in the pair.

        Raises:
            ValueError: If there is no document, or too many were left out.
        """
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        if num_documents == 0:
            raise ValueError(f"the input holds no text ({counts}); give files with text")
        num_bad = sum(count for reason, count in skipped.items() if reason != NO_TEXT)
        num_all = num_bad + num_documents
        if num_bad > self.largest_skipped_share * num_all:
            raise ValueError(
                f"{num_bad} of {num_all} documents are bad ({counts}), allowed is a share of "
                f"{self.largest_skipped_share:g}; mend the input or raise "
                "--largest_skipped_share"
            )
