"""Nothing from data, file names or errors acts on the terminal that shows it."""

from __future__ import annotations

import io
import re
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from batchrun.counters import Counters
from batchrun.report import live, summary
from batchrun.telemetry.printable import printable
from batchrun.telemetry.progress import Progress
from jobs import batchrun, load, write_job

HOSTILE = {
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "title": "\x1b]0;evil\x1b\\",
    "C1": "\x9b31m\x9d0;evil\x9c",
    "colour and cursor": "\x1b[31m\x1b[2J\x08\x7f",
    "bidi": "\u202eevil\u2066\u200f\u061c",
    "zero width": "e\u200bv\ufeff\u2060il",
    "line": "a\rb\u2028c",
    "surrogate": "a\udc9bb",
    "markup": "[bold red]evil[/][link=http://evil]x[/link] :smile: [/nothing]",
}
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


@pytest.mark.parametrize("name", HOSTILE)
def test_rows_are_shown_letter_by_letter_in_the_table_of_a_run(name: str) -> None:
    text = HOSTILE[name]
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="truecolor", width=200)
    values = {text: pa.array(["a"])} if name != "surrogate" else {"x": pa.array(["a"])}
    table = pa.table({**values, "answer": pa.array(["", None]).slice(0, 1)})
    cells = [[{"x": text}], text]
    console.print(summary.rows_table(table, table.column_names), markup=False)
    for cell in cells:
        console.print(summary.Text(summary._cell(cell)))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())  # Rich's own
    assert not ACTING.search(plain.replace("\n", ""))
    assert printable(text) in plain.replace("│", "").replace("\n", "")
    if name == "markup":
        assert "\x1b]8" not in shown.getvalue()


@given(st.text(st.characters()))
def test_no_control_format_or_surrogate_character_is_left(text: str) -> None:
    for newlines in (False, True):
        shown = printable(text, newlines)
        left = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp", "Cf")} - {"\n"}
        # What stands in front of digits in Arabic, Syriac and the like is printed.
        assert not {c for c in left if unicodedata.bidirectional(c) not in ("AN", "AL", "L")}, ascii(shown)
        assert newlines or "\n" not in shown
        shown.encode()


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_letters_numbers_and_signs_of_every_script_stay(text: str) -> None:
    hidden = {"\u115f", "\u1160", "\u3164", "\uffa0"}  # fillers: letters that nobody sees
    if not hidden & set(text):
        assert printable(text) == text


def test_the_live_view_shows_errors_letter_by_letter(tmp_path: Path, tiny_llama: Path) -> None:
    counts = Counters(rows=1, failed=1, errors={HOSTILE["clipboard"]: 1})
    now = Progress(1.0, 1, 0, 1, rows=1, rows_done=1, counts=counts, workers=1)
    shown = io.StringIO()
    view = live.View(load(write_job(tmp_path, tiny_llama)))
    Console(file=shown, force_terminal=True, width=200).print(view.render(now))
    assert "\x1b]52" not in shown.getvalue()
    assert "\\x1b]52" in shown.getvalue()


def hostile_job(folder: Path, model: Path) -> Path:
    path = write_job(
        folder, model, rows=4, output={"path": f"out{HOSTILE['title']}"}, limits={"max_error_rate": 1}
    )
    texts = [HOSTILE["clipboard"], HOSTILE["C1"], HOSTILE["markup"], HOSTILE["bidi"], None]
    pq.write_table(pa.table({"text": texts}), folder / "in.parquet")
    return path


def test_run_plan_verify_and_errors_print_no_control_character(tmp_path: Path, tiny_llama: Path) -> None:
    path = str(hostile_job(tmp_path, tiny_llama))
    said = {command: batchrun(command, path) for command in ("plan", "run")}
    next(tmp_path.rglob("data")).joinpath(f"x{HOSTILE['clipboard']}.parquet").write_bytes(b"")
    said["verify"] = batchrun("verify", path)
    said["error"] = batchrun("plan", path, "--set", f"input.path={HOSTILE['clipboard']}.parquet", "--debug")
    assert [code for code, _, _ in said.values()] == [0, 3, 1, 2], said
    for command, (_, out, err) in said.items():
        assert not ACTING.search(out + err), (command, ascii(out + err))
        assert "\\x1b]52;c;" in out + err, (command, ascii(out + err))
    assert "[bold red]evil" in said["plan"][1]
    assert "[bold" in said["run"][1]
