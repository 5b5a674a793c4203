"""`batchrun run` and `batchrun retry`: shown while they go on, then what came of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from batchrun import signals
from batchrun.commands.reply import LogFormat, Reply, Terminal, display, out
from batchrun.errors import BatchrunError, one_line
from batchrun.job.job import Job
from batchrun.job.output import SAMPLE
from batchrun.telemetry import logs

if TYPE_CHECKING:
    import pyarrow as pa

    from batchrun.report.result import RunResult
    from batchrun.telemetry.progress import Progress, ProgressCallback


def work_off(
    job: Job, work: Callable[..., RunResult], reply: Reply, log_format: LogFormat, as_json: bool
) -> None:
    """Shows `work(job, stop=, on_progress=, milestones=, standby=)` while it goes on, then what came of it.

    Raises:
        typer.Exit: always at the end, with the result's exit code.
    """
    from batchrun.driver.engines import standing_by

    # Before anything else: what they import takes longer than all that this process does meanwhile.
    with standing_by(job) as standby:
        from batchrun.report import live
        from batchrun.telemetry.milestones import Milestones

        with live.show(Terminal(stderr=True), log_format, job) as on_progress:
            result = work(
                job,
                stop=signals.stop,
                on_progress=_shown_if_possible(on_progress),
                milestones=Milestones.of_process(),
                standby=standby,
            )
            signals.decided(result.exit_code)
    with display():
        _show_result(job, result, as_json, reply)
    raise typer.Exit(result.exit_code)


def _shown_if_possible(on_progress: ProgressCallback) -> ProgressCallback:
    """The callback, whose errors no longer count once its terminal is gone: that is no reason to stop a run."""

    def forward(now: Progress) -> None:
        with display():
            on_progress(now)

    return forward


def _show_result(job: Job, result: RunResult, as_json: bool, reply: Reply) -> None:
    from batchrun.report import summary
    from batchrun.storage import NotFound

    if not as_json and result.rows:
        try:
            sample = result.sample(summary.SHOWN_ROWS)
        except (BatchrunError, NotFound) as error:
            logs.log.warning("no rows to show: %s", one_line(error))
        else:
            out.print(summary.rows_table(sample, _columns_to_show(job, sample)))
    reply.print(result.to_json(), summary.run_lines(result))


def _columns_to_show(job: Job, table: pa.Table) -> list[str]:
    """What the prompt was made of and what became of it, as far as both are in the output."""
    from batchrun.prompt.template import prompt_columns

    own = [job.output.column(name) for name in job.output.answer_columns]
    carried = [name for name in table.schema.names if name not in own]
    asked = [name for name in [*prompt_columns(job.prompt), *job.answer.read_columns] if name in carried]
    error = job.output.column("error")
    beside = [
        job.output.column(name) for name in ("probabilities", "perplexity") if name in job.output.columns
    ]
    sample = [job.output.column(SAMPLE)] if SAMPLE in job.output.columns else []
    answer = [*sample, job.output.column("answer"), *beside] + (
        [error] if table[error].null_count < table.num_rows else []
    )
    return [*(asked or carried)[:2], *answer]
