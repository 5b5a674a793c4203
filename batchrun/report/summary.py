"""What stands on the screen once a command is through: the plan, a run's end, a state, a verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from batchrun.engine.protocol import EngineStats
from batchrun.report.result import RunResult
from batchrun.telemetry.printable import printable
from batchrun.telemetry.progress import duration
from batchrun.telemetry.record import REPORT

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 5
CELL = 160  # characters of a value that are shown


def size(count: float) -> str:
    """Bytes as a person says them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def rows_table(table: pa.Table, columns: Sequence[str]) -> Table:
    """A few rows of an output, the given columns, long values cut."""
    shown = Table(show_lines=True)
    for name in columns:
        shown.add_column(Text(printable(name)), overflow="fold")
    for row in table.select(list(columns)).slice(0, SHOWN_ROWS).to_pylist():
        shown.add_row(*(Text(_cell(row[name])) for name in columns))
    return shown


def _cell(value: Any) -> str:
    text = "" if value is None else printable(str(value)[: 2 * CELL])
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def run_lines(result: RunResult) -> list[str]:
    """The end of a run: complete or with failures, how fast, on what, and where the answers lie."""
    lines = [f"{result.ok:,} of {result.rows:,} rows answered in {result.parts} parts: {result.output}/data"]
    if result.failed:
        lines.append(f"{result.failed:,} rows failed; the error column says why, row by row")
        lines += error_lines(result.errors, result.examples)
    if 2 * result.empty > result.ok:
        lines.append(
            f"warning: {result.empty:,} of {result.ok:,} answers are empty; check the prompt and the model's tokenizer"
        )
    if not result.requests and not result.reused:
        lines.append("nothing was left to do")
        return lines
    tokens = sum(stats.output_tokens for stats in result.engines)
    lines.append(
        f"{duration(result.seconds)}, {result.requests:,} rows generated, {result.reused:,} taken from an earlier run, "
        f"{tokens / max(result.seconds, 1e-9):,.0f} tokens/s out"
    )
    lines += [engine_line(stats) for stats in result.engines]
    lines += sorted({f"note: {note}" for stats in result.engines for note in stats.notes})
    lines.append(milestones_line(result.milestones))
    lines.append(f"report: {result.output}/{REPORT}")
    return lines


def milestones_line(milestones: Mapping[str, float]) -> str:
    """How many seconds after the command a run reached what, in one line."""
    return "after s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in milestones.items())


def error_lines(errors: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[str]:
    """Failed rows by code, the most frequent first, each with an example."""
    return [
        f"  {code} {count:,}, e.g. {examples[code][0]}" if examples.get(code) else f"  {code} {count:,}"
        for code, count in sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    ]


def engine_line(stats: EngineStats) -> str:
    """An engine's counters: what it ran on, tokens, speed and padding efficiency."""
    busy, tokens = stats.busy_seconds, stats.prompt_tokens + stats.output_tokens
    rate = f"busy {duration(busy)} at {tokens / busy:,.0f} tokens/s, " if busy else ""
    gauges = "".join(
        f", {name.replace('_', ' ')} {value:.3g}" for name, value in sorted(stats.gauges.items())
    )
    return (
        f"engine {stats.engine} ({stats.attention}, {stats.dtype} on {stats.device}): "
        f"{stats.prompt_tokens:,} tokens in, {stats.output_tokens:,} out, {rate}"
        f"padding efficiency {stats.padding_efficiency:.3f}{gauges}"
    )
