"""One piece of work at a time behind the training, on a thread of its own.

Knows nothing of checkpoints. Next file: `saver.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs a function, whose error comes out where one waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins; the work before has been waited for."""
        assert self._thread is None and self._error is None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # told by `wait`, on the thread that trains
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether the work has ended with an error that nobody has been told of."""
        return self._error is not None

    def wait(self) -> None:
        """Waits for the end of the work, if there is any.

        Raises:
            Exception: What the work has raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def ends_within(self, seconds: float) -> bool:
        """Waits so long at most; whether no work is under way then."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()
