"""Words in, calls out: every command is `batchrun COMMAND job.yaml [--set key.path=value ...]`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from batchrun import __version__
from batchrun.commands.reply import LogFormat, Reply, display, err, replying
from batchrun.commands.run import work_off
from batchrun.commands.usage import Commands
from batchrun.errors import JobError, OutputError, Refused
from batchrun.job.durations import parse_duration
from batchrun.job.job import Job
from batchrun.telemetry.printable import counted, printable

if TYPE_CHECKING:
    from batchrun.report.result import RunResult

app = typer.Typer(
    name="batchrun",
    cls=Commands,
    help="Batch inference over Parquet: one job file in, a complete dataset of answers out, exactly once.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 complete, 1 failed, 2 refused, 3 complete with failed rows, "
    "4 interrupted and resumable.",
)

JobFile = Annotated[Path, typer.Argument(help="the job file (YAML)", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override a key of the job", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="print one JSON object instead of text")]
Address = Annotated[str | None, typer.Option(help="of a running Dask scheduler")]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="take over from another driver that seems to be at work")
]
ErrorRate = Annotated[
    float | None, typer.Option(min=0, max=1, help="share of failed rows that stops it, for this run alone")
]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="of progress and warnings")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="show the traceback of an error")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="show the version and exit"
        ),
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: batchrun plan job.yaml --trial 60s --gpus 8")
def plan(
    job_file: JobFile,
    overrides: Overrides = [],
    trial: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="try the engine on sampled rows for this long, e.g. 60s"),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="estimate for this many GPUs")] = None,
    compare: Annotated[
        Literal["fp8"] | None,
        typer.Option(
            help="with --trial: run sampled rows with and without fp8, and tell how far the answers agree"
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell how much there is, whether it will work, how long it takes and what it costs, from a sample."""
    with replying(as_json, debug) as reply:
        if compare is not None and trial is None:
            raise JobError(
                "nothing to compare without a trial", "--compare", f"add --trial 60s to --compare {compare}"
            )
        job = _load(job_file, overrides, reply)
        from batchrun.commands import plan as preview

        found = preview.preview(job, None if trial is None else _seconds(trial), gpus, compare)
        reply.print(found, preview.lines(found))


@app.command(epilog="Example: batchrun run job.yaml --set output.path=s3://lake/answers/2026-01-31/")
def run(
    job_file: JobFile,
    overrides: Overrides = [],
    address: Address = None,
    max_error_rate: ErrorRate = None,
    force: Force = False,
    log_format: Logs = "text",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Start a job, or go on where an earlier run of it ended."""

    with replying(as_json, debug, log_format, resumable=True) as reply:
        job = _load(job_file, [*overrides, *_for_this_run(address, max_error_rate)], reply)

        def work(job: Job, **how: Any) -> RunResult:
            from batchrun.driver import run as driver

            return driver.run(job, force=force, **how)

        work_off(job, work, reply, log_format, as_json)


@app.command(epilog="Example: batchrun retry job.yaml --error PROMPT_TOO_LONG --set prompt.truncate=left")
def retry(
    job_file: JobFile,
    errors: Annotated[
        list[str],
        typer.Option("--error", metavar="CODE", help="rows with this error only", show_default=False),
    ] = [],
    allow: Annotated[
        list[str],
        typer.Option(
            metavar="KEY", help="a setting that may differ, such as prompt.template", show_default=False
        ),
    ] = [],
    overrides: Overrides = [],
    address: Address = None,
    max_error_rate: ErrorRate = None,
    force: Force = False,
    log_format: Logs = "text",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the failed rows of a complete output again, once their cause is fixed."""

    with replying(as_json, debug, log_format, resumable=True) as reply:
        job = _load(job_file, [*overrides, *_for_this_run(address, max_error_rate)], reply)

        def work(job: Job, **how: Any) -> RunResult:
            from batchrun.driver import retry as retrying

            return retrying.retry(job, errors=errors, allow=allow, force=force, **how)

        work_off(job, work, reply, log_format, as_json)


@app.command(epilog="Example: batchrun status job.yaml --json")
def status(
    job_file: JobFile, overrides: Overrides = [], as_json: AsJson = False, debug: Debug = False
) -> None:
    """Tell how far the output is, from the store alone."""
    with replying(as_json, debug) as reply:
        job = _load(job_file, overrides, reply)
        from batchrun.commands.status import status as read_status

        found = read_status(job)
        reply.print(found.to_json(), found.lines())


@app.command(epilog="Example: batchrun report job.yaml --out report.html")
def report(
    job_file: JobFile,
    overrides: Overrides = [],
    out_file: Annotated[
        Path, typer.Option("--out", help="where to write the page", show_default=True)
    ] = Path("report.html"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the report of an output as one HTML page, from the store alone."""
    with replying(as_json, debug) as reply:
        job = _load(job_file, overrides, reply)
        from batchrun.report import page

        text = reply.redact(page.render(page.Facts.read(job)))
        try:
            out_file.parent.mkdir(parents=True, exist_ok=True)
            out_file.write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            fix = "give another file by --out"
            raise OutputError(f"cannot be written ({error.strerror})", str(out_file), fix) from None
        reply.print({"report": str(out_file)}, [f"report: {out_file}"])


@app.command(epilog="Example: batchrun verify job.yaml")
def verify(
    job_file: JobFile, overrides: Overrides = [], as_json: AsJson = False, debug: Debug = False
) -> None:
    """Read everything back: rows in = rows ok + rows failed, part by part."""
    with replying(as_json, debug) as reply:
        job = _load(job_file, overrides, reply)
        from batchrun.commands.verify import verify as verify_output

        found = verify_output(job)
        reply.print(found.to_json(), found.lines())
        raise typer.Exit(found.exit_code)


@app.command(epilog="Example: batchrun clean job.yaml --all")
def clean(
    job_file: JobFile,
    overrides: Overrides = [],
    everything: Annotated[
        bool, typer.Option("--all", metavar="", help="the answers too: the next run starts from nothing")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="with --all: do not ask")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Delete what is left over from interrupted runs; never a row that is still needed."""
    with replying(as_json, debug) as reply:
        job = _load(job_file, overrides, reply)
        from batchrun.commands.clean import clean as clean_output

        deleted = clean_output(job, everything, None if yes else _ask)
        reply.print({"deleted": len(deleted)}, [f"{counted(len(deleted), 'object')} deleted"])


@app.command(epilog="Example: batchrun bench --model tiny --workload extract --rows 20 --engine padded")
def bench(
    context: typer.Context,
    job_file: Annotated[Path | None, typer.Argument(help="take model and rows from this job")] = None,
    overrides: Overrides = [],
    model: Annotated[
        str, typer.Option(help="a known shape (qwen3-0.6b, llama-8b, qwen3-30b-a3b, tiny) or a folder")
    ] = "tiny",
    workload: Annotated[str, typer.Option(help="summarise, extract, write, chat or long")] = "extract",
    shape: Annotated[
        str | None,
        typer.Option(
            help="tokens in and out of every row, instead of a workload: 1000/200", show_default="none"
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="rows to run", show_default="1000 on a GPU, 100 on a CPU")
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="paged, padded", show_default="the job's; both on a GPU, padded on a CPU"
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="of the shape's or folder's weights: fp8", show_default="none; the job's"),
    ] = None,
    cache_dtype: Annotated[
        Literal["auto", "fp8"],
        typer.Option(
            help="of the shape's or folder's keys and values: auto, fp8", show_default="auto; the job's"
        ),
    ] = "auto",
    gpus: Annotated[
        int, typer.Option(min=1, help="that share the paged engine", show_default="1; the job's")
    ] = 1,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure this machine: tokens per second, padding and share of the roofline, engine against engine."""
    with replying(as_json, debug) as reply:
        from batchrun.commands import bench as benchmark

        _refuse_unused(context, job_file, overrides)
        if job_file is None:
            results = benchmark.bench(
                model,
                shape or workload,
                rows,
                engines,
                quantization=quantization,
                cache_dtype=cache_dtype,
                gpus=gpus,
            )
        else:
            results = benchmark.bench_job(_load(job_file, overrides, reply), rows, engines)
        values = [asdict(result) for result in results]
        reply.print({"results": values}, benchmark.format_results(results).splitlines())


def _refuse_unused(context: typer.Context, job_file: Path | None, overrides: list[str]) -> None:
    """What a bench with a job takes from the job, and what changes a job where there is none."""
    if job_file is None:
        if overrides:
            raise JobError("--set is for a job's keys, and no job is given", "bench", "add the job file")
        return
    for option in ("model", "workload", "shape", "quantization", "cache_dtype", "gpus"):
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            name = option.replace("_", "-")
            fix = "leave it out, or change the job by --set, such as --set model.name=org/name"
            raise JobError(f"--{name} is for a bench without a job", "bench", fix)


def _for_this_run(address: str | None, max_error_rate: float | None) -> list[str]:
    values = {"cluster.address": address, "limits.max_error_rate": max_error_rate}
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


@app.command(epilog="Example: batchrun init s3://lake/reviews/ --model org/name --out job.yaml")
def init(
    dataset: Annotated[str, typer.Argument(help="Parquet: a file, folder, glob or URL", show_default=False)],
    job_file: Annotated[Path, typer.Option("--out", help="the job file to write")] = Path("job.yaml"),
    model: Annotated[str | None, typer.Option(help="hub id, folder or URL", show_default=False)] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a commented job file for a dataset."""
    with replying(as_json, debug) as reply:
        from batchrun.commands import init as starter

        written = starter.init(dataset, job_file, model or starter.MODEL)
        lines = [
            f"wrote {' and '.join(map(str, written))}",
            f"next: look it over, then `batchrun plan {job_file}`",
        ]
        reply.print({"written": [str(path) for path in written]}, lines)


@app.command(epilog="Example: batchrun schema --markdown")
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", metavar="", help="a reference for people")] = False,
) -> None:
    """Print the JSON Schema of a job file, for editors, or a reference of its keys."""
    from batchrun.job import schema as description

    with display():
        if markdown:
            print(description.markdown(), end="")
        else:
            print(json.dumps(description.json_schema(), indent=1))


def _load(job_file: Path, overrides: list[str], reply: Reply) -> Job:
    job = Job.load(job_file, overrides)
    reply.redact.add(job.secrets())
    return job


def _ask(what: str) -> None:
    """Goes on only if a person at the terminal says so."""
    if not (sys.stdin.isatty() and err.is_terminal):
        raise Refused(
            f"this would delete {what}", "clean --all", "add --yes to do it without a terminal to ask on"
        )
    err.print(printable(f"This deletes {what}."))
    if not typer.confirm("Delete them?", err=True):
        raise Refused("nothing deleted")


def _seconds(text: str) -> float:
    try:
        seconds = parse_duration(text).total_seconds()
    except ValueError as error:
        raise JobError(str(error), "--trial", "write --trial 60s") from None
    if not seconds:
        raise JobError("no time to try anything", "--trial", "write --trial 60s")
    return seconds
