"""The documents of a pair as contiguous splits for training, validation and test."""

from __future__ import annotations

import numpy as np

SPLITS = ("train", "valid", "test")


def split_bounds(split: str, num_documents: int) -> list[tuple[int, int]]:
    """Contiguous ranges of documents for train, valid and test.

    Args:
        split: Up to three shares, such as `969,30,1`; they need not sum to 1.
        num_documents: Documents to divide.

    Raises:
        ValueError: If split is not such shares.
    """
    try:
        shares = [float(share) for share in split.split(",")]
        valid = 1 <= len(shares) <= 3 and min(shares) >= 0 and 0 < sum(shares) < float("inf")
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"data.split={split} must be up to three shares, none negative, not all 0; "
            "write it as 969,30,1"
        )
    shares += [0.0] * (3 - len(shares))
    cumulative = np.cumsum([0.0, *shares]) / sum(shares)
    bounds = [round(share * num_documents) for share in cumulative.tolist()]
    return list(zip(bounds[:-1], bounds[1:], strict=True))
