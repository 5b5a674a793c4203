"""The runner as its user meets it: the real command, real processes, one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from distributed import Client
from fleet import fleet

import batchrun as library
from batchrun import signals
from batchrun.commands.clean import clean
from batchrun.commands.plan import preview
from batchrun.commands.verify import verify
from batchrun.errors import (
    ChangedError,
    ExitCode,
    InputError,
    JobError,
    LeaseHeld,
    ModelError,
    OutputError,
    TooManyFaults,
)
from batchrun.job.output import OUTPUT_COLUMNS
from batchrun.output import state
from batchrun.output.lease import Lease
from batchrun.storage import Folder
from jobs import answers, batchrun, check_complete, dataset, environment, load, start, wait_until, write_job

ROWS = 60


def everything_under(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_complete_in_input_order_with_types_untouched_and_a_second_run_does_nothing(
    tmp_path, tiny_llama
):
    job = write_job(tmp_path, tiny_llama)
    code, out, err = batchrun("run", str(job))
    assert code == 0, err
    assert "60 of 60 rows answered in 3 parts" in out
    assert "row 0" in out, "the table of a few rows"
    table = check_complete(tmp_path / "out", ROWS)
    assert set(table["finish_reason"].to_pylist()) == {"length"}
    before = everything_under(tmp_path / "out")
    code, out, err = batchrun("run", str(job), "--json")
    assert (code, json.loads(out)["requests"]) == (0, 0), err
    assert everything_under(tmp_path / "out") == before, "a run after success writes nothing"
    code, out, err = batchrun("verify", str(job), "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["rows"], found["ok"]) == (0, True, ROWS, ROWS), found
    code, out, _ = batchrun("status", str(job), "--json")
    assert (code, json.loads(out)["complete"]) == (0, True)
    code, out, _ = batchrun("clean", str(job), "--all", "--yes", "--json")
    assert code == 0
    assert not everything_under(tmp_path / "out")


def test_plan_shows_what_a_run_would_do_and_writes_nothing(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    before = everything_under(tmp_path)
    code, out, err = batchrun("plan", str(job), "--set", "output.rows_per_part=30", "--json")
    plan = json.loads(out)
    assert (code, plan["rows"], plan["partitions"]) == (0, ROWS, 2), err
    lengths = [len(text) for text in dataset(ROWS)["text"].to_pylist()]  # one token per byte
    assert plan["prompt_tokens"]["max"] == max(lengths)
    assert plan["prompt_tokens"]["estimated_total"] == sum(lengths)
    assert everything_under(tmp_path) == before


def test_python_gives_the_same_meaning_and_a_dask_frame_with_arrow_types(tmp_path, tiny_llama, cluster):
    result = library.run(write_job(tmp_path, tiny_llama), client=cluster)
    assert (result.rows, result.ok, result.failed, result.requests) == (ROWS, ROWS, 0, ROWS)
    check_complete(tmp_path / "out", ROWS)
    frame = result.to_dask()
    assert frame.npartitions == 3
    whole = pa.Table.from_pandas(frame.compute(scheduler="synchronous"), preserve_index=False)
    assert whole["id"].to_pylist() == dataset(ROWS)["id"].to_pylist()
    assert pa.types.is_int64(whole.schema.field("id").type)
    assert whole["tags"].to_pylist() == dataset(ROWS)["tags"].to_pylist()


def test_a_running_scheduler_is_used_by_its_address_and_left_running(tmp_path, tiny_llama):
    """Its engines are as well, and what they did for an earlier run is not counted again."""
    job = write_job(tmp_path, tiny_llama)
    with fleet(tmp_path / "logs") as one:
        one.worker("127.0.0.1")
        one.wait_for(1)
        found = []
        for output in ("out", "again"):
            path = str(tmp_path / output)
            words = ("--address", one.address, "--set", f"output.path={path}", "--json")
            code, out, err = batchrun("run", str(job), *words)
            assert code == 0, err
            found.append(json.loads(out))
        assert [run["requests"] for run in found] == [ROWS, ROWS]
        engines = [engine for run in found for engine in run["engines"]]
        assert len({engine["pid"] for engine in engines}) == 1
        assert [engine["completions"] for engine in engines] == [ROWS, ROWS]
        assert engines[0]["load_seconds"] > engines[1]["load_seconds"] == 0
        with Client(one.address, set_as_default=False) as client:
            assert client.submit(int, "1").result() == 1, "the cluster goes on"
    check_complete(tmp_path / "out", ROWS)


def test_a_lost_scheduler_interrupts_the_run_and_the_same_command_goes_on(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    file = str(tmp_path / "scheduler.json")
    own = ["--scheduler-file", file, "--no-dashboard"]
    python = [sys.executable, "-m"]
    quiet = {"env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [*python, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *own], **quiet
    )
    worker = subprocess.Popen(
        [*python, "distributed.cli.dask_worker", "--nthreads", "2", "--death-timeout", "30", *own], **quiet
    )
    try:
        wait_until(lambda: Path(file).exists() and Path(file).read_text(), scheduler)
        address = json.loads(Path(file).read_text())["address"]
        run = start("run", str(job), "--address", address)
        wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), run)
        scheduler.kill()
        _, err = run.communicate(timeout=90)
        assert run.returncode == 4, err
        assert "lost the Dask scheduler" in err
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.requests < ROWS
    check_complete(tmp_path / "out", ROWS)


def test_repeated_user_ids_and_failed_rows_are_all_kept(tmp_path, tiny_llama, cluster):
    limits = {"max_error_rate": 1.0}
    job = write_job(tmp_path, tiny_llama, prompt={"template": "{{ id }}"}, limits=limits)
    result = library.run(job, client=cluster)
    table = answers(tmp_path / "out")
    ids = dataset(ROWS)["id"].to_pylist()
    assert table["id"].to_pylist() == ids, "every id twice, and nulls, in input order"
    expected = ["ok" if i is not None else "failed" for i in ids]
    assert table["status"].to_pylist() == expected
    errors = [e for e in table["error"].to_pylist() if e]
    assert all(e.startswith("NULL_PROMPT: ") for e in errors)
    assert (result.exit_code, result.errors) == (ExitCode.FAILED_ROWS, {"NULL_PROMPT": len(errors)})
    assert verify(load(job)).exit_code == ExitCode.FAILED_ROWS


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_are_a_success_with_one_part_that_carries_the_schema(tmp_path, tiny_llama, cluster, rows):
    job = write_job(tmp_path, tiny_llama, rows=rows)
    assert library.run(job, client=cluster).exit_code == ExitCode.COMPLETE
    table = answers(tmp_path / "out")
    assert table.num_rows == rows
    assert table.select(dataset(0).column_names).schema.equals(dataset(0).schema)
    assert verify(load(job)).found.passed


def test_metadata_and_extension_types_reach_the_parts_and_survive_a_retry(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=1, limits={"max_error_rate": 1.0})
    point = {b"ARROW:extension:name": b"acme.point", b"ARROW:extension:metadata": b""}
    fields = [pa.field("text", pa.string()), pa.field("p", pa.int32(), metadata=point)]
    table = pa.table(
        {"text": ["x", None], "p": pa.array([1, 2], pa.int32())},
        schema=pa.schema(fields, metadata={b"owner": b"me"}),
    )
    pq.write_table(table, tmp_path / "in.parquet")
    library.run(job, client=cluster)
    for again in (False, True):
        if again:
            library.retry(job, client=cluster)
        schema = pq.read_schema(next((tmp_path / "out/data").iterdir()))
        assert schema.metadata[b"owner"] == b"me"
        assert schema.field("p").metadata[b"ARROW:extension:name"] == b"acme.point"
        assert verify(load(job)).found.passed


def test_an_input_without_rows_is_warned_about_or_refused(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, input={"filters": [["text", "=", "nothing"]]})
    code, out, err = batchrun("plan", str(job))
    assert code == 0
    assert "there is nothing to generate" in out
    assert "no row of the input passes the filters; input.allow_empty: false refuses that" in " ".join(
        err.split()
    )
    with pytest.raises(InputError, match="no row of the input passes the filters"):
        library.run(load(job, "input.allow_empty=false"))


def test_no_carried_columns_and_the_same_prompt_still_give_every_row(tmp_path, tiny_llama, cluster):
    job = write_job(
        tmp_path, tiny_llama, input={"columns": []}, prompt={"template": "hello{{ '' if text else '' }}"}
    )
    assert library.run(job, client=cluster).ok == ROWS
    table = answers(tmp_path / "out")
    assert table.column_names == list(OUTPUT_COLUMNS)
    assert table["answer"].to_pylist() == ["hello"] * ROWS
    assert verify(load(job)).found.passed


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ("input.path=none-*.parquet", InputError, "none-"),
        ("prompt.template={{ txet }}", InputError, "did you mean 'text'"),
        ("prompt.template=Summarise this", JobError, "the template reads no column"),
        ("prompt.template=Is {text} like {{ kind }}?", JobError, "write {{ text }}"),
        ("output.columns={answer: text}", OutputError, "answer_2"),
        ("model.name=/nowhere/model", ModelError, "no such folder"),
        ("output.path=/proc/answers", OutputError, "cannot be written to"),
    ],
)
def test_what_is_wrong_is_said_before_any_engine_is_loaded(tmp_path, tiny_llama, change, error, says):
    job = write_job(tmp_path, tiny_llama)
    with pytest.raises(error) as caught:
        library.run(load(job, change))
    assert says in str(caught.value)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert not (tmp_path / "out/data").exists()


def test_an_error_is_one_line_and_an_exit_code(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    code, out, err = batchrun("run", str(job), "--set", "generatoin.seed=1")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "did you mean 'generation'" in err
    code, out, err = batchrun("run", str(job), "--address", "tcp://127.0.0.1:1", "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)
    assert "no Dask scheduler answers" in json.loads(out)["error"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, cluster):
    folder = tmp_path_factory.mktemp("finished")
    library.run(write_job(folder, tiny_llama), client=cluster)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("generation.temperature=0.7", "generation.temperature: 0.0 -> 0.7"),
        ("prompt.template={{ text }}!", "prompt.template"),
        ("input.limit=10", "input.limit"),
        ("model.dtype=float16", "model.dtype"),
    ],
)
def test_a_changed_job_refuses_to_write_and_shows_the_difference(finished, change, says):
    before = everything_under(finished / "out")
    with pytest.raises(ChangedError, match="output") as caught:
        library.run(load(finished / "job.yaml", change))
    assert says in str(caught.value)
    assert everything_under(finished / "out") == before


def test_changed_inputs_refuse_to_write_and_show_the_difference(finished):
    before = everything_under(finished / "out")
    kept = (finished / "in.parquet").rename(finished / "kept")
    pq.write_table(dataset(ROWS + 1), finished / "in.parquet")
    try:
        with pytest.raises(ChangedError) as caught:
            library.run(load(finished / "job.yaml"))
    finally:
        kept.rename(finished / "in.parquet")
    assert "in.parquet" in str(caught.value)
    assert everything_under(finished / "out") == before


def test_a_changed_model_refuses_to_write(finished, tmp_path):
    from tiny_models import make_model

    other = make_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(ChangedError, match=r"model: .*llama -> .*other"):
        library.run(load(finished / "job.yaml", f"model.name={other}"))


def test_an_adapter_that_is_new_or_changed_refuses_to_write(finished, tiny_llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    with pytest.raises(ChangedError, match=r"model: .* -> .*, adapter /"):
        library.run(load(finished / "job.yaml", f"model.adapter={adapter}"))


def test_a_plan_lists_the_output_once(finished, monkeypatch):
    scan, listings = state.scan, []
    monkeypatch.setattr(state, "scan", lambda *output: listings.append(output) or scan(*output))
    assert preview(load(finished / "job.yaml"))["rows_left"] == 0
    assert len(listings) == 1


def test_foreign_files_in_data_are_never_joined_and_never_deleted(tmp_path, tiny_llama):
    job = load(write_job(tmp_path, tiny_llama))
    mine = tmp_path / "out/data/mine.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"mine\.parquet"):
        library.run(job)
    assert [*(tmp_path / "out").rglob("*")] == [mine.parent, mine]
    with pytest.raises(OutputError, match="no run was ever started here"):
        clean(job, everything=True)
    assert mine.read_bytes() == b"mine"


def test_a_model_that_fails_most_rows_stops_the_job_early_with_examples(tmp_path, tiny_llama, cluster):
    job = write_job(
        tmp_path, tiny_llama, rows=4000, row_group=1000,
        engine={"kind": "engines:FailingEngine"}, output={"rows_per_part": 1000}, limits={"error_sample": 100},
    )  # fmt: skip
    with pytest.raises(TooManyFaults) as caught:
        library.run(job, client=cluster)
    assert "BAD_LOGITS: not a number" in str(caught.value)
    assert "limits.max_error_rate" in str(caught.value)
    assert caught.value.exit_code == ExitCode.FAILED
    assert len(list((tmp_path / "out").glob("data/*"))) < 4


def test_one_interrupt_stages_what_is_finished_and_the_same_command_goes_on(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    stage = tmp_path / "out/_job/stage"
    process = start("run", str(job))
    wait_until(lambda: list(stage.rglob("*.chunk")), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "the same command goes on from there" in err
    code, out, err = batchrun("status", str(job), "--json")
    state = json.loads(out)
    assert code == 0
    assert not state["complete"]
    assert state["begun"] + state["committed"] > 0
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.requests < ROWS
    check_complete(tmp_path / "out", ROWS)


def test_a_stop_that_a_supervisor_sends_twice_stages_what_is_finished(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    process = start("run", str(job))
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "rows are safe" in err.splitlines()[-1]
    assert list((tmp_path / "out/_job/runs").glob("*.json")), "the run is on record"


def test_a_second_interrupt_stops_at_once_and_the_same_command_goes_on(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    process = start("run", str(job))
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), process)
    process.send_signal(signal.SIGINT)
    time.sleep(signals.SAME_STOP + 0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 4
    process.communicate()
    library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    check_complete(tmp_path / "out", ROWS)


def test_a_job_started_twice_says_so_and_forced_takes_over(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    first = start("run", str(job))
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), first)
    with pytest.raises(LeaseHeld, match="--force"):
        library.run(job, client=cluster)
    library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster, force=True)
    _, err = first.communicate(timeout=120)
    # It finds every part committed, unless it looks at its lease, every 10 s, while the other one holds that.
    assert first.returncode == 0 or (first.returncode == 2 and "took it over; stopped, all staged" in err), (
        err
    )
    check_complete(tmp_path / "out", ROWS)
    assert verify(load(job)).found.passed


def test_a_run_whose_lease_is_taken_over_stops_with_its_rows_staged(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=300, engine={"kind": "engines:SecondsEngine"})
    first = start("run", str(job))
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), first)
    with Lease(Folder(str(tmp_path / "out")), force=True):
        _, err = first.communicate(timeout=60)
    assert first.returncode == ExitCode.REFUSED, err
    assert f"process {os.getpid()} on" in err
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.requests < 300
    check_complete(tmp_path / "out", 300)
    runs = json.loads(batchrun("status", str(job), "--json")[1])["runs"]
    assert [run["outcome"] for run in runs] == ["interrupted", "complete"]


def test_planted_secrets_are_in_no_file_no_log_and_no_message(tmp_path, tiny_llama):
    job = write_job(
        tmp_path,
        tiny_llama,
        output={"storage_options": {"token": "${PLANTED}"}},
        input={"storage_options": {"token": "${PLANTED}"}},
    )
    secret = "planted-s3cret-value"
    # Local files take no such option; whatever comes of it, the value must show up nowhere.
    for words in (["plan"], ["run"], ["run", "--debug"], ["status"], ["verify"], ["run", "--json"]):
        code, out, err = batchrun(words[0], str(job), *words[1:], PLANTED=secret)
        assert code in (0, 1, 2), (words, err)
        assert secret not in out + err, words
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
