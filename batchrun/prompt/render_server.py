"""The renderer's side of the process border: `python -m batchrun.prompt.render_server <socket>`.

A template's author is trusted, yet a row may make it endless. Python cannot be interrupted inside one long call in C,
so every row has two timers of CPU time: the first raises in Python, the second ends the process. Memory is the
process's own limit.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import Template, TemplateError

from batchrun.errors import FaultCode, RowFault
from batchrun.prompt.sandbox import ENVIRONMENT, MEMORY, NULL, NULL_PRINTED, TEXT, TOO_LARGE, NullPrinted

# Seconds of CPU time for one row; the process ends after twice as many.
SECONDS = 1.0
# Rows that take less together share a setting of the timers, which costs as much as a short row.
SHARED_SECONDS = 0.01

TOO_LONG = f"rendering takes more than {SECONDS:g} s of CPU time"

LOST_ANSWER = "it leaves out, or changes, the assistant's message that is to be continued"


class _TooLong(BaseException):
    """No Exception, which Jinja's own code would catch here and there."""


def compile_all(sources: Sequence[str]) -> list[str | None]:
    """What is wrong with each template, if anything."""
    return [_compile_error(source) for source in sources]


def rows(sources: Sequence[str], names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """For each row a list of texts, one per template, or its fault; a null column is None in `rows`.

    Only of the first rows, at least one, where they take long: the parent sees that it goes on, and asks again.
    """

    templates: list[Template] = []

    def render(row: tuple[Any, ...]) -> list[str]:
        if not templates:
            templates.extend([_compiled(source) for source in sources])
        variables = {name: NULL if value is None else value for name, value in zip(names, row, strict=True)}
        return [_bounded(template.render(variables)) for template in templates]

    return _first(render, rows)


def chats(template: str, variables: dict[str, Any], rows: Iterable[tuple[Any, Any]]) -> list[Any]:
    """For each conversation, its messages and its tools, its text or its fault; only of the first, as in `rows`.

    The text ends where the model is to go on: behind a last message of the assistant, else where its own begins.
    """
    # A second, for the jobs that need it; it comes without torch.
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(row: tuple[list[dict[str, Any]], list[dict[str, Any]] | None]) -> str:
        messages, tools = row
        continues = bool(messages) and messages[-1]["role"] == "assistant"
        try:
            texts, _ = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                continue_final_message=continues,
                add_generation_prompt=not continues,
                **variables,
            )
        except ValueError as error:
            if continues and str(error).startswith("continue_final_message is set"):
                # transformers' message has the whole conversation in it.
                raise ValueError(LOST_ANSWER) from None
            raise
        return _bounded(texts[0])

    return _first(render, rows, "chat template: ")


def _first(render: Callable[[Any], Any], rows: Iterable[Any], where: str = "") -> list[Any]:
    """The rendered rows or their faults, as many as take about SECONDS."""
    done: list[Any] = []
    now = time.monotonic()
    until, limited = now + SECONDS, -1.0
    try:
        for row in rows:
            if now - limited > SHARED_SECONDS:
                _limit(SECONDS)
                limited = now
            done.append(_result(render, row, where))
            now = time.monotonic()
            if now > until:
                break
    finally:
        _limit(0)
    return done


def _limit(seconds: float) -> None:
    """Of CPU time from now on; 0 for none."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds)


def _result(render: Callable[[Any], Any], row: Any, where: str = "") -> Any:
    """The rendered row, or its fault."""
    try:
        return render(row)
    except NullPrinted:
        return RowFault(FaultCode.NULL_PROMPT, NULL_PRINTED)
    except _TooLong:
        return RowFault(FaultCode.TEMPLATE_ERROR, where + TOO_LONG)
    except MemoryError:
        return RowFault(FaultCode.TEMPLATE_ERROR, where + TOO_LARGE)
    except Exception as error:
        # A template runs expressions: they may raise anything.
        kind = "" if where else f"{type(error).__name__}: "
        return RowFault(FaultCode.TEMPLATE_ERROR, f"{where}{kind}{error}")


def _bounded(text: str) -> str:
    if len(text) > TEXT:
        raise MemoryError
    return text


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


def _compile_error(source: str) -> str | None:
    def attempt(source: str) -> None:
        try:
            _compiled(source)
        except TemplateError as error:
            raise ValueError(error.message) from None

    (fault,) = _first(attempt, [source])
    return None if fault is None else str(fault.message).removeprefix("ValueError: ")


def _expired(*_: object) -> None:
    raise _TooLong


def main(descriptor: int) -> None:
    """Answers until the parent closes its side, or is killed. Signals to the process group are the parent's to heed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGVTALRM, _expired)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers: dict[str, Callable[..., list[Any]]] = {"compile": compile_all, "rows": rows, "chats": chats}
    with Connection(descriptor) as connection:
        while True:
            try:
                kind, arguments = connection.recv()
            except (EOFError, OSError):
                return
            answer = answers[kind](*arguments)
            try:
                connection.send(answer)
            except OSError:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
