"""Wrong words on the command line, answered by one line as every other mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from batchrun.errors import ExitCode, Refused
from batchrun.telemetry.printable import printable

# Base of what typer raises about words; it exports this one alone.
UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The commands; in place of typer's box of several lines, one with what, where and the fix."""

    def make_context(self, *words: Any, **how: Any) -> Any:
        """Reads a command's words; wrong ones end it as `_one_line` says."""
        with _one_line():
            return super().make_context(*words, **how)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that the words name, likewise."""
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(around: Any = None) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        context = error.ctx or around
        command = context.command_path if context else "batchrun"
        text = (
            error.format_message()
            .rstrip(".")
            .replace("Value error, ", "")
            .replace("Input should be", "must be")
        )
        text = re.sub(r"^[A-Z]", lambda first: first[0].lower(), " ".join(text.split()))
        refused = Refused(text, command, f"see `{command} --help`")
        print(printable(f"error: {refused}"), file=sys.stderr)
        raise typer.Exit(ExitCode.REFUSED) from None
