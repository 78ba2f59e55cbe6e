"""A line of progress every ten seconds, with the share done and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable

_REPORT_SECONDS = 10.0


class Progress:
    """Says how far a loop of known length is.

    Args:
        what: What is done, the beginning of each line.
        total: Parts of it.
        report: Receives the lines; None says nothing.
    """

    def __init__(self, what: str, total: int, report: Callable[[str], None] | None) -> None:
        self._what = what
        self._total = total
        self._report = report
        self._begin = self._reported = time.monotonic()
        self._done = 0

    def add(self, num_parts: int) -> None:
        """Counts parts that are done."""
        self._done += num_parts
        now = time.monotonic()
        if self._report is None or now - self._reported < _REPORT_SECONDS:
            return
        self._reported, share = now, self._done / self._total
        left = (now - self._begin) * (1 - share) / share
        self._report(f"{self._what}: {share:.0%}, {left:.0f} s left")
