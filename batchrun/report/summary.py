"""What stands on the screen once a command is through: the plan, a run's end, a state, a verification."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.report.result import RunResult
from batchrun.telemetry.printable import counted, printable
from batchrun.telemetry.progress import duration
from batchrun.telemetry.record import REPORT

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 5
# Characters of a value that are shown: enough to judge an answer.
CELL = 600
# Share of answers that are cut or empty above which that is likely a mistake.
NOTABLE = 0.02


def rows_table(table: pa.Table, columns: Sequence[str]) -> Table:
    """A few rows of an output, the given columns, long values cut."""
    shown = Table(show_lines=True)
    for name in columns:
        shown.add_column(Text(printable(name)), overflow="fold")
    for row in table.select(list(columns)).slice(0, SHOWN_ROWS).to_pylist():
        shown.add_row(*(Text(_cell(row[name])) for name in columns))
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        # A field on each line: that of a schema's answers, or of choices' probabilities.
        text = "\n".join(f"{printable(name)}: {_cell(field)}" for name, field in value.items())
    elif isinstance(value, list):
        text = printable(json.dumps(value, ensure_ascii=False, default=str)[: 2 * CELL])
    else:
        # A probability to a hundredth of a per cent, whatever else a double holds as it is to that place.
        shown = str(round(value, 4)) if isinstance(value, float) and abs(value) >= 1e-4 else str(value)
        text = "" if value is None else printable(shown[: 2 * CELL])
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def number(value: float) -> str:
    """A figure as a person reads it: three digits below a hundred, whole ones above."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def money(value: float) -> str:
    """An amount to the cent, below one to a hundredth of it."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.4f}"


def run_lines(result: RunResult) -> list[str]:
    """The end of a run: complete or with failures, how fast, on what, and where the answers lie."""
    lines = [
        f"{result.ok:,} of {result.rows:,} rows answered{_of_input(result)} in {counted(result.parts, 'part')}: "
        f"{result.output}/data"
    ]
    if result.failed:
        lines.append(
            f"{counted(result.failed, 'row')} failed, each with its reason in the error column; "
            "once the cause is fixed, `batchrun retry` runs them again"
        )
        lines += error_lines(result.errors, result.examples)
    lines += _answer_lines(result)
    counts = result.counts
    if not counts.rows and not counts.reused:
        lines.append("nothing was left to do")
        return lines
    before = f", {counts.reused:,} taken from an earlier run" if counts.reused else ""
    # Not "generated": those among them that have no prompt never were, nor those that are scored.
    done = counted(counts.rows - counts.copied, "row")
    lines.append(
        f"{duration(result.seconds)}: {done} done{_copied(counts)}{before}; "
        f"{counts.prompt_tokens:,} tokens in, "
        f"{counts.output_tokens:,} out, {number(counts.output_tokens / max(result.seconds, 1e-9))} tokens/s out"
        f"{_per_gpu(result)}"
    )
    # Engines that tell nothing of themselves are told of once.
    lines += dict.fromkeys(engine_line(stats) for stats in result.engines)
    lines += sorted({f"note: {note}" for stats in result.engines for note in stats.notes})
    lines.append(milestones_line(result.milestones))
    if "report" in result.milestones:
        lines.append(f"report: {result.output}/{REPORT}")
    return lines


def _per_gpu(result: RunResult) -> str:
    """Where an engine has several GPUs: tokens in and out by the time of all of them, from their workers' start on."""
    rate = result.tokens_per_gpu_second
    if result.gpus_per_engine == 1 or rate is None:
        return ""
    return f"; {number(rate)} tokens/s in and out per GPU ({result.gpus_per_engine} per engine)"


def _of_input(result: RunResult) -> str:
    if result.rows <= result.input_rows or not result.input_rows:
        return ""
    each = result.rows // result.input_rows
    return f" ({each} samples of each of the input's {result.input_rows:,} rows)"


def _copied(counts: Counters) -> str:
    if not counts.copied:
        return ""
    return f", {counts.copied:,} copied from rows with the same prompt ({counts.copied_tokens:,} tokens)"


def milestones_line(milestones: Mapping[str, float]) -> str:
    """How many seconds after the command a run reached what, in one line, first things first."""
    reached = sorted(milestones.items(), key=lambda item: item[1])
    return "timeline: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in reached)


def _answer_lines(result: RunResult) -> Iterator[str]:
    """How the answers ended, with a warning where many of them are of little use."""
    # Rows that the engine answered, those among them whose answer is invalid since it was cut.
    answered = sum(result.finish_reasons.values()) - result.finish_reasons.get("error", 0)
    # Of scored rows nothing is generated.
    if not answered or not result.output_tokens:
        return
    cut, empty = result.finish_reasons.get("length", 0), result.empty
    shares = [f"{count:,} ({count / answered:.1%}) {what}" for count, what in ((cut, CUT), (empty, "empty"))]
    yield f"answers: {result.output_tokens / answered:,.0f} tokens on average, {', '.join(shares)}"
    if cut > NOTABLE * answered:
        yield f"warning: {cut / answered:.1%} of the answers are {CUT}; raise it if they end in mid-sentence"
    if empty > NOTABLE * answered:
        yield f"warning: {empty / answered:.1%} of the answers are empty; read some, and try another prompt"


CUT = "cut at generation.max_new_tokens"


def error_lines(errors: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> list[str]:
    """Failed rows by code, the most frequent first, each with an example."""
    lines = []
    for code, count in sorted(errors.items(), key=lambda item: (-item[1], item[0])):
        # An example names its code, as the output does.
        shown = [f", e.g. {one.replace(f'{code}: ', '', 1)}" for one in examples.get(code, ())]
        lines.append(f"  {code} {count:,}" + "".join(shown[:1]))
    return lines


def engine_line(stats: EngineStats) -> str:
    """What an engine ran on and how well it was used; tokens are the run's to tell, who counts finished rows."""
    busy = stats.busy_seconds
    rate = (stats.prompt_tokens + stats.output_tokens) / busy if busy else 0.0
    facts = [f"busy {duration(busy)} at {number(rate)} tokens/s"] if busy else []
    if stats.computed_tokens:
        facts.append(f"padding efficiency {stats.padding_efficiency:.3f}")
    if stats.engine == "paged":
        share = stats.shared_tokens / max(1, stats.shared_tokens + stats.prompt_tokens)
        facts.append(f"shared prompt tokens {stats.shared_tokens:,} ({share:.0%})")
    facts += [f"{name.replace('_', ' ')} {number(value)}" for name, value in sorted(stats.gauges.items())]
    on = ", ".join(word for word in (stats.attention, stats.dtype) if word)
    engine = f"engine {stats.engine} ({f'{on} on ' if on else ''}{stats.device or 'cpu'})"
    return f"{engine}: {', '.join(facts)}" if facts else engine
