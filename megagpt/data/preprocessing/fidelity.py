"""What of a text its tokens do not give back: characters that vanish, unknown tokens.

Next file: `shards.py`, which measures each document that need not come back exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megagpt.data.indexed.manifest import Fidelity

_SHOWN = 10


def lost(text: str, decoded: str) -> tuple[int, str]:
    """UTF-8 bytes of the characters of which fewer come back than went in, and some of them.

    A lower bound of what is lost, in time linear in the text: order is not looked at.
    """
    missing = Counter(text) - Counter(decoded)
    num_bytes = sum(len(character.encode()) * count for character, count in missing.items())
    return num_bytes, "".join(sorted(missing)[:_SHOWN])


def require_whole(
    fidelity: Fidelity, *, text_bytes: int, num_tokens: int, largest_share: float
) -> None:
    """Refuses a pair of which too much does not come back.

    Raises:
        ValueError: With the shares and the first places.
    """
    shares: Mapping[str, float] = {
        "of the bytes do not come back": fidelity.lost_bytes / max(text_bytes, 1),
        "of the tokens are unknown": fidelity.unknown_tokens / max(num_tokens, 1),
    }
    if max(shares.values()) > largest_share:
        found = " and ".join(f"{share:.2%} {what}" for what, share in shares.items())
        raise ValueError(
            f"{found}, allowed is a share of {largest_share:g} ({'; '.join(fidelity.first[:3])}); "
            "take a tokenizer that has a token for every byte, or raise --largest_lost_share"
        )


def told(fidelity: Fidelity, *, text_bytes: int, num_documents: int) -> str:
    """The figures in one line."""
    return (
        f"not given back exactly: {fidelity.altered_documents} of {num_documents} documents, "
        f"{fidelity.lost_bytes / max(text_bytes, 1):.2%} of the bytes lost, "
        f"{fidelity.unknown_tokens} unknown tokens ({'; '.join(fidelity.first[:3])})"
    )
