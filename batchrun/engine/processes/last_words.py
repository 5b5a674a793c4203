"""What an engine's process printed before it ended: the error among it, without the noise around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LINES = 200  # of output that are kept
WIDTH = 500  # characters of a line that is shown in a message

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):|During handling of|The above exception was")
_IGNORED = re.compile(r"Exception ignored (in|while)")
# Lines of torch, of faulthandler and of the C++ runtime that stand around an error and say nothing about it.
_NOISE = re.compile(
    r"""frame\ \#\d+:|Exception\ raised\ from\ |C\+\+\ CapturedTraceback:|\#\d+\ .*\ from\ |
    CUDA\ kernel\ errors\ might|For\ debugging\ consider|Compile\ with\ `TORCH_USE_CUDA_DSA|Search\ for\ `cuda|
    Device-side\ assertion|terminate\ called\ (after|recursively)|
    (Current\ thread|Thread)\ 0x|<no\ Python\ frame>|Extension\ modules:|File\ ".*",\ line\ \d+|
    Aborted|Segmentation\ fault|Killed|\[?[0-9a-fx]+\]?$|[-=~^*\s]*$""",
    re.VERBOSE,
)
_WHAT = re.compile(r"what\(\):\s*")
# An exception without the traceback that it belongs to: its beginning was cut off, or only its name was printed.
_EXCEPTION = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception)(:|$)")
# How glibc, assert(3), glog and CUDA itself put it.
_ABORT = re.compile(
    r"""(free|malloc|realloc|calloc|munmap_chunk|mremap_chunk|malloc_consolidate)\(\):\ |corrupted\ |double\ free\ or|
    \*\*\*\ .*\ \*\*\*|.*:\d+:\ .*Assertion\ .*\ failed|.*\ Check\ failed:|(.*:\s)?CUDA\ error|
    terminate\ called\ without""",
    re.VERBOSE,
)
_FATAL = re.compile(r"Fatal Python error: ")


def lines_of(output: str) -> list[str]:
    """The last LINES lines, without colours; a progress bar's states are lines too."""
    lines = re.split(r"[\r\n]+", _COLOURS.sub("", output))
    return [line.rstrip() for line in lines if line.strip()][-LINES:]


def error_line(lines: Iterable[str]) -> str:
    """The error that the process ended with, as it was printed last; empty where nothing looks like one.

    That is a Python exception's own line, what a C++ exception says, or the line of whoever aborted.
    """
    fatal = error = ""
    for kind, line in _errors(list(lines)):
        if kind is _FATAL:
            fatal = line
        else:
            error = line
    return (error or fatal)[:WIDTH]


def last_line(lines: Iterable[str]) -> str:
    """The last line that says anything, of a process that printed no error; empty where there is none."""
    return next((line.strip()[:WIDTH] for line in reversed(list(lines)) if not _is_noise(line)), "")


def _errors(lines: list[str]) -> Iterator[tuple[re.Pattern[str], str]]:
    in_traceback = ignored = False
    for i, line in enumerate(lines):
        text = line.strip()
        if _IGNORED.match(text):
            ignored = True
        elif _TRACEBACK.match(text):
            in_traceback = True
        elif in_traceback:
            if line[:1].isspace() or _is_noise(line):
                continue
            in_traceback = False
            if not ignored:
                yield _TRACEBACK, _whole(text, lines[i + 1 :])
            ignored = False
        elif what := _WHAT.match(text):
            if said := _whole(text[what.end() :], lines[i + 1 :]):
                yield _WHAT, said
        elif _is_noise(line):
            continue
        elif _FATAL.match(text):
            yield _FATAL, text
        elif _EXCEPTION.match(text) or _ABORT.match(text):
            yield _EXCEPTION, _whole(text, lines[i + 1 :])


def _whole(text: str, following: list[str]) -> str:
    """A message whose first line is empty goes on in the next one."""
    if text and not text.endswith(":"):
        return text
    return f"{text} {next((line.strip() for line in following if not _is_noise(line)), '')}".strip()


def _is_noise(line: str) -> bool:
    text = line.strip()
    return _NOISE.match(text) is not None or _WHAT.fullmatch(text) is not None
