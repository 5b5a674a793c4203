"""The process's start and end: signals first, then the command, then an exit code that tells of the data."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from batchrun import signals
from batchrun.model import light


def main() -> None:
    """Runs the command line, and ends with a code that tells of the data."""
    _replace_closed_streams()
    signals.install()
    os.environ[light.VARIABLE] = "1"
    code: int | str | None = 0
    try:
        from batchrun.cli import app

        app()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        # A stop in the midst of an import may come out of it as any error.
        if not signals.stop.is_set():
            raise
        with suppress(OSError):
            print("stopped", file=sys.stderr)
        code = signals.exit_code()
    end(code)


def end(code: int | str | None) -> NoReturn:
    """Ends the process as `sys.exit` does, but not through the interpreter's last collections, which take most of a
    second, and in which a thread that is still reading in C++ would abort the process and change its code."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    _flush()
    signals.leave(code or 0)
    if not signals.stop.is_set():
        # What hangs in one of them must not keep a process that was told to stop.
        atexit._run_exitfuncs()
    _flush()
    os._exit(code or 0)


def _replace_closed_streams() -> None:
    """What is written to a stream that is closed (`>&-`) goes nowhere: else the next file that is opened would get its
    number, and with it what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    main()
