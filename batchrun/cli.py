"""Words in, calls out: every command is `batchrun COMMAND job.yaml [--set key.path=value ...]`."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from batchrun.errors import BatchrunError, ExitCode
from batchrun.job import OUTPUT_COLUMNS, Job
from batchrun.report.redact import Redactor

if TYPE_CHECKING:
    import pyarrow as pa

    from batchrun.report.result import RunResult

app = typer.Typer(
    name="batchrun",
    help="Batch inference over Parquet: one job file in, a complete dataset of answers out, exactly once.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 complete, 1 failed, 2 refused before start, 3 complete with failed rows, "
    "4 interrupted and resumable.",
)

JobFile = Annotated[Path, typer.Argument(help="the job file (YAML)", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override a key of the job", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Address = Annotated[str | None, typer.Option(help="of a running Dask scheduler")]
Force = Annotated[bool, typer.Option(help="run although another driver seems to be at work")]
ErrorRate = Annotated[
    float | None, typer.Option(min=0, max=1, help="share of failed rows that stops it, for this once")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


@app.command()
def plan(job_file: JobFile, overrides: Overrides = [], as_json: AsJson = False, debug: Debug = False) -> None:
    """Show partitions, rows, bytes and prompt lengths on a sample; writes nothing."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, overrides, redact)
        from batchrun.report import summary
        from batchrun.report.preview import preview

        found = preview(job)
        _print(found, summary.plan_lines(found), as_json, redact)


@app.command()
def run(
    job_file: JobFile,
    overrides: Overrides = [],
    address: Address = None,
    max_error_rate: ErrorRate = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Start a job, or go on where an earlier run of it ended."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, [*overrides, *_for_this_run(address, max_error_rate)], redact)
        stop = _stop_on_signals()
        from batchrun import driver
        from batchrun.report import progress

        with progress.show(err) as watch:
            result = driver.run(job, force=force, stop=stop, watch=watch)
        _end(job, result, as_json, redact)


@app.command()
def retry(
    job_file: JobFile,
    errors: Annotated[
        list[str],
        typer.Option("--error", metavar="CODE", help="rows with this error only", show_default=False),
    ] = [],
    allow: Annotated[
        list[str],
        typer.Option(metavar="KEY", help="a setting that may differ, as prompt.template", show_default=False),
    ] = [],
    overrides: Overrides = [],
    address: Address = None,
    max_error_rate: ErrorRate = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the failed rows of a complete output again, once their cause is mended."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, [*overrides, *_for_this_run(address, max_error_rate)], redact)
        stop = _stop_on_signals()
        from batchrun import retrying
        from batchrun.report import progress

        with progress.show(err) as watch:
            result = retrying.retry(job, errors=errors, allow=allow, force=force, stop=stop, watch=watch)
        _end(job, result, as_json, redact)


@app.command()
def status(
    job_file: JobFile, overrides: Overrides = [], as_json: AsJson = False, debug: Debug = False
) -> None:
    """Tell how far the output is, from the store alone."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, overrides, redact)
        from batchrun.report.status import status as read_status

        found = read_status(job)
        _print(found.to_json(), found.lines(), as_json, redact)


@app.command()
def verify(
    job_file: JobFile, overrides: Overrides = [], as_json: AsJson = False, debug: Debug = False
) -> None:
    """Read everything back: rows in = rows ok + rows failed, part by part."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, overrides, redact)
        from batchrun.report.status import verify as verify_output

        found = verify_output(job)
        _print(found.to_json(), found.lines(), as_json, redact)
        raise typer.Exit(found.exit_code)


@app.command()
def clean(
    job_file: JobFile,
    overrides: Overrides = [],
    everything: Annotated[
        bool, typer.Option("--all", help="the answers too: the next run starts from nothing")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Delete what is left over from interrupted runs; never a row that is still needed."""
    with _errors(as_json, debug) as redact:
        job = _load(job_file, overrides, redact)
        from batchrun.report.status import clean as clean_output

        deleted = clean_output(job, everything)
        _print({"deleted": len(deleted)}, [f"{len(deleted):,} objects deleted"], as_json, redact)


@app.command()
def bench(
    job_file: Annotated[Path | None, typer.Argument(help="take model and rows from this job")] = None,
    overrides: Overrides = [],
    model: Annotated[
        str, typer.Option(help="a known shape (qwen3-0.6b, llama-8b, tiny) or a folder")
    ] = "tiny",
    workload: Annotated[str, typer.Option(help="summarise, extract or write")] = "extract",
    rows: Annotated[int, typer.Option(min=1, help="rows to run")] = 200,
    engines: Annotated[list[str], typer.Option("--engine", help="paged, padded; both by default")] = [
        "paged",
        "padded",
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure this machine: tokens per second, padding and share of the roofline, engine against engine."""
    with _errors(as_json, debug) as redact:
        from batchrun import bench as benchmark

        if job_file is None:
            results = benchmark.bench(model, workload, rows, engines)
        else:
            job = _load(job_file, overrides, redact)
            folder, sample = benchmark.sample_job(job, rows)
            options = job.engine.model_dump(exclude={"kind"})
            results = benchmark.bench(folder, sample, engines=engines, dtype=job.model.dtype, options=options)
        values = [asdict(result) for result in results]
        _print({"results": values}, benchmark.format_results(results).splitlines(), as_json, redact)


def _for_this_run(address: str | None, max_error_rate: float | None) -> list[str]:
    values = {"cluster.address": address, "limits.max_error_rate": max_error_rate}
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _end(job: Job, result: RunResult, as_json: bool, redact: Redactor) -> None:
    from batchrun.report import summary

    if not as_json and result.rows:
        sample = result.sample(summary.SHOWN_ROWS)
        out.print(summary.rows_table(sample, _columns_to_show(job, sample)), markup=False)
    _print(result.to_json(), summary.run_lines(result), as_json, redact)
    raise typer.Exit(result.exit_code)


def _load(job_file: Path, overrides: list[str], redact: Redactor) -> Job:
    job = Job.load(job_file, overrides)
    redact.add(job.secrets())
    return job


def _columns_to_show(job: Job, table: pa.Table) -> list[str]:
    """What the prompt was made of and what became of it, as far as both are in the output."""
    from batchrun.prompt.template import prompt_columns

    own = [job.output.column(name) for name in OUTPUT_COLUMNS]
    carried = [name for name in table.schema.names if name not in own]
    asked = [name for name in prompt_columns(job.prompt) if name in carried]
    error = job.output.column("error")
    answer = [job.output.column("answer")] + ([error] if table[error].null_count < table.num_rows else [])
    return [*(asked or carried)[:2], *answer]


def _print(value: dict[str, Any], lines: list[str], as_json: bool, redact: Redactor) -> None:
    if as_json:
        print(redact(json.dumps(value)))
    else:
        for line in lines:
            out.print(redact(line), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _errors(as_json: bool, debug: bool) -> Iterator[Redactor]:
    """One line for a person, an exit code for a scheduler, and no secret in either."""
    redact = Redactor()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(redact.filter_record)
    try:
        yield redact
    except typer.Exit:
        raise
    except (BatchrunError, KeyboardInterrupt) as error:
        if debug:
            err.print(redact(traceback.format_exc()), markup=False, highlight=False)
        code = error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERRUPTED
        text = redact(str(error) or "stopped")
        if as_json:
            print(json.dumps({"status": code.name.lower(), "exit_code": int(code), "error": text}))
        err.print(f"error: {text}", markup=False, highlight=False)
        raise typer.Exit(code) from None
    except Exception as error:
        if debug:
            err.print(redact(traceback.format_exc()), markup=False, highlight=False)
        text = redact(f"{type(error).__name__}: {error}".splitlines()[0])
        if as_json:
            print(json.dumps({"status": "failed", "exit_code": int(ExitCode.FAILED), "error": text}))
        hint = "" if debug else "; add --debug for the traceback"
        err.print(f"error: unexpected {text}{hint}", markup=False, highlight=False)
        raise typer.Exit(ExitCode.FAILED) from None


def _stop_on_signals() -> threading.Event:
    """The first Ctrl-C or SIGTERM lets tasks stage what they hold; the second ends the process now.

    Both leave a state that the same command goes on from: workers and engines end with their parent, and a lease
    whose process is gone is taken over.
    """
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(ExitCode.INTERRUPTED)
        stop.set()
        os.write(2, b"stopping: staging what is finished; once more to stop at once\n")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def main() -> None:
    app()
