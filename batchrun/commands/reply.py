"""What a command says: text for a person or one JSON object for a program, one line for an error, never a secret."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NoReturn, TextIO

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType

from batchrun import signals
from batchrun.errors import (
    BatchrunError,
    ExitCode,
    InternalError,
    Interrupted,
    is_bug,
    is_interrupt,
    one_line,
)
from batchrun.telemetry import logs
from batchrun.telemetry.printable import printable
from batchrun.telemetry.redact import Redactor

LogFormat = Literal["text", "json"]


class Terminal(Console):
    """Standard output or standard error, which a pipe may close."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on (`| head -1`): told like any output that cannot be written, not by an exit with code 1."""
        raise


# What is printed is text from data as a rule: never markup, never the name of an emoji.
out = Terminal(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Terminal(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


class Reply:
    """One command's: `print` its results, or end it with `fail`. What is in `redact` is never shown."""

    def __init__(self, as_json: bool, debug: bool, log_format: LogFormat) -> None:
        self.redact = Redactor()
        self._json = _our_own_output() if as_json else None
        self._printed = False
        self._debug, self._log_format = debug, log_format

    def print(self, value: dict[str, Any], lines: Sequence[RenderableType]) -> None:
        """The value for a program, or the lines for a person."""
        if self._json is not None:
            self._print_object(self.redact.values(value))
            return
        with display():
            for line in lines:
                out.print(_wrapped(printable(self.redact(line)), out) if isinstance(line, str) else line)

    def fail(self, error: BaseException) -> NoReturn:
        """Says what the command ended with, and ends the process with its code."""
        text, shown, code = self._told(error)
        if self._debug:
            with display():
                err.print(printable(self.redact(traceback.format_exc()), newlines=True))
        self.end(text, shown, code)
        raise typer.Exit(code) from None

    def end(self, text: str, shown: str, code: ExitCode) -> None:
        """The last line of a command that has not come to its end, once."""
        signals.last_words = signals.silent
        self.tell_program(text, code)
        with display():
            if self._log_format == "json":
                logs.log.error("%s", shown, extra={"fields": {"event": "end", "exit_code": int(code)}})
            else:
                err.print(_wrapped(printable(shown), err))

    def tell_program(self, text: str, code: ExitCode) -> None:
        """The same for a program alone."""
        self._print_object({"status": code.name.lower(), "exit_code": int(code), "error": text})

    def _print_object(self, value: dict[str, Any]) -> None:
        """The one that there is with --json, whatever comes after it."""
        if self._json is not None and not self._printed:
            self._printed = True
            with display(self._json):
                print(json.dumps(value), file=self._json)

    def stopped(self) -> tuple[str, str, ExitCode]:
        """Text, line and exit code of a command that a signal ended: what is safe, as far as that is known."""
        text = self.redact(signals.safe) or (
            f"stopped; {signals.GOES_ON}" if signals.resumable else "stopped"
        )
        return text, text, ExitCode(signals.exit_code())

    def _told(self, error: BaseException) -> tuple[str, str, ExitCode]:
        """The error's text, the line that is shown, and the exit code."""
        # A stop in the midst of an import leaves modules by halves: what other threads make of those is no bug.
        unexpected = not isinstance(error, BatchrunError)
        if is_interrupt(error) or (signals.stop.is_set() and unexpected):
            return self.stopped()
        if is_bug(error):
            error = InternalError.of(error)
        if isinstance(error, BatchrunError):
            text = self.redact(str(error))
            return text, text if isinstance(error, Interrupted) else f"error: {text}", error.exit_code
        text = self.redact(one_line(error))
        hint = "" if self._debug else "; add --debug for the traceback"
        return text, f"error: unexpected {text}{hint}", ExitCode.FAILED


def _wrapped(line: str, console: Console) -> str:
    """On a terminal, a line that is too long is broken between words; paths stay whole, to be copied."""
    if not console.is_terminal or cell_len(line) <= console.width:
        return line
    return textwrap.fill(
        line, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


@contextmanager
def replying(
    as_json: bool, debug: bool, log_format: LogFormat = "text", resumable: bool = False
) -> Iterator[Reply]:
    """One line for a person and an exit code for a scheduler, whatever is raised inside.

    Args:
        resumable: whether the command goes on from where it was stopped, if it is given again.
    """
    signals.resumable = resumable
    reply = Reply(as_json, debug, log_format)
    logs.configure(log_format, reply.redact)
    signals.decided(ExitCode.INTERRUPTED)
    signals.last_words = lambda: reply.end(*reply.stopped())
    signals.tell_program = lambda text: reply.tell_program(text, ExitCode(signals.exit_code()))
    try:
        yield reply
    except typer.Exit:
        raise
    except (KeyboardInterrupt, Exception) as error:
        reply.fail(error)


@contextmanager
def display(stream: TextIO | None = None) -> Iterator[None]:
    """What comes of showing something (a closed pipe, a full disk, a terminal that is gone) is no error of the data.

    Args:
        stream: what it is shown on; standard output by default.
    """
    stream = stream or sys.stdout
    try:
        yield
        stream.flush()
    except (OSError, KeyboardInterrupt) as error:
        # What is still in the buffer would fail again when the process ends.
        _discard(stream)
        if not isinstance(error, BrokenPipeError | KeyboardInterrupt):
            logs.log.warning("the rest cannot be shown: %s", one_line(error))


def _our_own_output() -> TextIO:
    """Standard output, from now on for the one object alone: what libraries, in any thread, and child processes print
    there goes to standard error."""
    ours = sys.__stdout__
    if ours is None or ours is not sys.stdout:
        # Whoever calls the command in a process of his own has put another one in its place.
        return sys.stdout
    ours.flush()
    kept = os.dup(ours.fileno())
    os.dup2(sys.stderr.fileno(), ours.fileno())
    return open(kept, "w", encoding="ascii")


def _discard(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
