"""The process's start and end: signals first, then the command, then an exit code that tells of the data."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress

from batchrun import signals
from batchrun.model import light


def main() -> None:
    """Runs the command line, and ends with a code that tells of the data."""
    signals.install()
    os.environ[light.VARIABLE] = "1"
    code: int | str | None = 0
    try:
        from batchrun.cli import app

        app()
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = signals.exit_code()
    # The interpreter's last collections walk through all modules, for most of a second, and free nothing of use.
    gc.freeze()
    if signals.stop.is_set() or not _flushed():
        # What hangs in an exit handler, or has nowhere to write to, must not change the code.
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _flushed() -> bool:
    """Whether all that was printed could be written; Python would end with 120 otherwise."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
