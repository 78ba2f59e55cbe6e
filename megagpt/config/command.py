"""What every command does with an error of its user: one line and an exit code.

Imports the standard library only, so that a command starts at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
TRACEBACK_VARIABLE = "MEGAGPT_TRACEBACK"
"""Environment variable; 1 shows the traceback of an error too."""


class UsageError(ValueError):
    """The command line itself is wrong; the exit code is 2."""


def run_command(main: Callable[[list[str]], int | None]) -> int:
    """Runs a command on `sys.argv` and turns a user's error into one line on stderr.

    With MEGAGPT_TRACEBACK=1 in the environment the traceback is shown as well.

    Args:
        main: Takes the arguments, returns an exit code or None for 0.

    Returns:
        The exit code: main's, 1 for an error, 2 for a wrong command line, 130 when interrupted,
        141 when what reads the output has closed it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal's encoding has no character for is shown as \u1234.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as `head`, has enough; what is left unwritten goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
