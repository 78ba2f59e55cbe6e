"""What a preprocessing job says of itself, a line at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megagpt.data.indexed.manifest import Manifest

_PROGRESS_SECONDS = 2.0

Report = Callable[[str], None]


def report_to_stderr(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Lines with the share done, MB/s and the time left.

    Args:
        total_bytes: Size of the whole input.
        before_bytes: What an earlier run has done of it.
        report: Receives the lines.
    """

    def __init__(self, total_bytes: int, before_bytes: int, report: Report) -> None:
        self._total_bytes = total_bytes
        self._before_bytes = before_bytes
        self._report = report
        self._start_seconds = self._last_seconds = time.monotonic()
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Counts input that is done; a line every two seconds."""
        self._done_bytes += num_bytes
        now = time.monotonic()
        if now - self._last_seconds < _PROGRESS_SECONDS:
            return
        self._last_seconds = now
        rate = self._done_bytes / (now - self._start_seconds)
        done = self._before_bytes + self._done_bytes
        self._report(
            f"encoded {done / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, "
            f"{rate / 1e6:.2f} MB/s, {(self._total_bytes - done) / rate:.0f} s left"
        )

    def finish(self, manifest: Manifest) -> None:
        """The last line: what came of it, and how fast."""
        seconds = time.monotonic() - self._start_seconds
        skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
        self._report(
            f"documents={manifest.num_documents} tokens={manifest.num_tokens} "
            f"bytes_per_token={(manifest.text_bytes or 0) / manifest.num_tokens:.3f} "
            f"skipped={skipped or 0} seconds={seconds:.1f} "
            f"MB_per_second={self._done_bytes / 1e6 / max(seconds, 1e-9):.2f}"
        )
