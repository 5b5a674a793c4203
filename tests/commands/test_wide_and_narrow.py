"""What a command says on a terminal of any width: whole words, whole paths."""

from __future__ import annotations

import io

import pytest

from batchrun.commands import reply
from batchrun.errors import ExitCode
from batchrun.telemetry.printable import counted

LINE = "timeline: imported 1.1 s, cluster ready 2.5 s, engine started 3.4 s, report s3://bucket/a/folder/report.html"


def shown(line: str, width: int, terminal: bool, stream: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A result on standard output, or the line that a command ends with on standard error."""
    file = io.StringIO()
    monkeypatch.setattr(
        reply,
        stream,
        reply.Terminal(file=file, width=width, force_terminal=terminal, soft_wrap=True, highlight=False),
    )
    said = reply.Reply(as_json=False, debug=False, log_format="text")
    if stream == "out":
        said.print({}, [line])
    else:
        said.end(line, line, ExitCode.FAILED)
    return file.getvalue()


@pytest.mark.parametrize("stream", ["out", "err"])
@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_long_line_is_broken_between_words_and_a_path_never(
    width: int, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown(LINE, width, True, stream, monkeypatch)
    assert said.split() == LINE.split()
    lines = said.splitlines()
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    assert len(lines) == 1 or all(line.startswith("  ") for line in lines[1:])


@pytest.mark.parametrize("stream", ["out", "err"])
def test_a_file_or_a_pipe_gets_each_line_as_it_is(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(LINE, 30, False, stream, monkeypatch) == f"{LINE}\n"


def test_one_is_not_several() -> None:
    assert (counted(1, "part"), counted(1200, "part")) == ("1 part", "1,200 parts")
