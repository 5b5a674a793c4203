"""Failed rows run again after their cause was fixed, as a user does it: real commands, processes, kills."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchrun as library
from batchrun.commands.clean import clean
from batchrun.commands.status import status
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, ExitCode, JobError, LeaseHeld, OutputError, TooManyFaults
from jobs import answers, batchrun, dataset, load, start, write_job

ROWS = 60
TOO_LONG = "prompt.max_bytes=12"  # a few rows of each part have longer texts
MENDED = "prompt.max_bytes=1000"


def texts(rows: int = ROWS) -> list[str]:
    return dataset(rows)["text"].to_pylist()


def long_rows(rows: int = ROWS) -> list[int]:
    return [i for i, text in enumerate(texts(rows)) if len(text) > 12]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out/data").iterdir())}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "out/_job/manifest.json").read_text())


def replaced_since(folder: Path, before: dict[str, bytes]) -> set[str]:
    return {name for name, data in bytes_of(folder).items() if data != before[name]}


def staged_for_others(folder: Path, before: dict[str, bytes]) -> list[Path]:
    """Chunks of the first retry for parts that it has not replaced yet."""
    replaced = replaced_since(folder, before)
    # Unlike glob, it does not mind a folder that is swept meanwhile.
    folders = [(Path(where), names) for where, _, names in os.walk(folder / "out") if where.endswith("-r1")]
    return [
        where / name
        for where, names in folders
        for name in names
        if name.endswith(".chunk") and f"part-{where.name[:-3]}.parquet" not in replaced
    ]


def failing_job(folder: Path, model: Path, **sections: object) -> Path:
    output = {"path": "out", "rows_per_part": 20, "flush_rows": 4, "flush_seconds": 0.3, "failed": "failed"}
    limits = {"max_error_rate": 1.0}
    return write_job(
        folder, model, rows=ROWS, prompt={"max_bytes": 12}, output=output, limits=limits, **sections
    )


@pytest.fixture
def job(tmp_path, tiny_llama, cluster) -> Path:
    """A finished job with failed rows in each of its three parts."""
    path = failing_job(tmp_path, tiny_llama)
    result = library.run(path, client=cluster)
    assert (result.failed, result.errors) == (len(long_rows()), {"PROMPT_TOO_LONG": len(long_rows())})
    return path


def test_a_retry_generates_only_what_failed_and_the_manifest_tells_of_it(job, tmp_path, cluster):
    before = manifest_of(tmp_path)
    result = library.retry(load(job, MENDED), client=cluster)
    assert (result.exit_code, result.ok, result.requests) == (ExitCode.COMPLETE, ROWS, len(long_rows()))
    assert answers(tmp_path / "out")["answer"].to_pylist() == texts()
    assert verify(load(job)).exit_code == ExitCode.COMPLETE
    after = manifest_of(tmp_path)
    assert [part["key"] for part in after["parts"]] == [part["key"] for part in before["parts"]]
    (one,) = after["retries"]
    assert (one["number"], one["finished"]) == (1, True)
    assert one["changes"] == ["prompt.max_bytes: 12 -> 1000"]
    assert [part["old"] for part in one["parts"]] == [part["attempt"] for part in before["parts"]]
    assert [part["new"] for part in one["parts"]] == [part["attempt"] for part in after["parts"]]
    assert sum(part["rows"] for part in one["parts"]) == len(long_rows())
    # Neither the changed job nor the first one is refused now, and neither finds anything to do.
    for again in (load(job), load(job, MENDED)):
        assert library.run(again, client=cluster).requests == 0
    written = bytes_of(tmp_path)
    assert library.retry(load(job, MENDED), client=cluster).requests == 0
    assert bytes_of(tmp_path) == written
    assert manifest_of(tmp_path) == after


def test_failed_rows_stand_in_a_dataset_of_their_own_with_their_place_in_the_input(job, tmp_path, cluster):
    failed = pq.read_table(tmp_path / "out/failed")
    assert sorted(failed["text"].to_pylist()) == sorted(texts()[i] for i in long_rows())
    assert set(failed["source_file"].to_pylist()) == {str(tmp_path / "in.parquet")}
    groups, offsets = failed["source_row_group"].to_pylist(), failed["source_row"].to_pylist()
    assert sorted(10 * g + o for g, o in zip(groups, offsets, strict=True)) == long_rows()
    assert all(error.startswith("PROMPT_TOO_LONG: ") for error in failed["error"].to_pylist())
    file = next((tmp_path / "out/failed").iterdir())
    whole = file.read_bytes()
    pq.write_table(pq.read_table(file).slice(1), file)
    assert f"failed/{file.name}: other rows" in "; ".join(verify(load(job)).found.problems)
    file.write_bytes(whole)
    assert verify(load(job)).found.passed
    library.retry(load(job, MENDED), client=cluster)
    assert not list((tmp_path / "out").glob("failed/*")), "nothing failed any more"
    clean(load(job), everything=True)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_only_the_named_errors_are_retried_and_untouched_parts_keep_their_bytes(
    tmp_path, tiny_llama, cluster
):
    # Null ids fail everywhere; the only long text of a row with an id stands in the last part.
    template = "{{ id }}{{ 'x' * 20 if text.startswith('row 42 ') else '' }}"
    limits = {"max_error_rate": 1.0}
    prompt = {"template": template, "max_bytes": 12}
    job = write_job(tmp_path, tiny_llama, prompt=prompt, limits=limits)
    first = library.run(job, client=cluster)
    assert first.errors["PROMPT_TOO_LONG"] == 1
    before = bytes_of(tmp_path)
    result = library.retry(load(job, MENDED), errors=["PROMPT_TOO_LONG"], client=cluster)
    assert (result.requests, set(result.errors)) == (1, {"NULL_PROMPT"})
    after = bytes_of(tmp_path)
    assert [name for name in after if after[name] != before[name]] == [sorted(after)[2]]
    assert result.failed == first.failed - 1
    with pytest.raises(JobError, match="did you mean 'NULL_PROMPT'"):
        library.retry(job, errors=["NULL_PROMT"])


def test_another_template_is_refused_until_it_is_named_and_then_recorded(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, prompt={"template": "{{ id }}"}, limits={"max_error_rate": 1.0})
    library.run(job, client=cluster)
    before = bytes_of(tmp_path)
    other = load(job, "prompt.template={{ text }}")
    with pytest.raises(
        ChangedError, match=r"answers of two different jobs.*--allow prompt.template"
    ) as caught:
        library.retry(other, client=cluster)
    assert caught.value.exit_code == ExitCode.REFUSED
    with pytest.raises(ChangedError, match="which rows and columns"):
        library.retry(load(job, "output.rows_per_part=10"), allow=["output"], client=cluster)
    assert bytes_of(tmp_path) == before
    assert not list((tmp_path / "out").glob("_job/retries/*"))
    assert library.retry(other, allow=["prompt.template"], client=cluster).failed == 0
    ids = dataset(ROWS)["id"].to_pylist()
    expected = [text if i is None else str(i) for i, text in zip(ids, texts(), strict=True)]
    assert answers(tmp_path / "out")["answer"].to_pylist() == expected
    assert manifest_of(tmp_path)["retries"][0]["changes"] == ["prompt.template: {{ id }} -> {{ text }}"]
    assert verify(load(job)).found.passed


def test_an_unfinished_output_is_not_retried(tmp_path, tiny_llama):
    job = failing_job(tmp_path, tiny_llama)
    with pytest.raises(OutputError, match="no run was ever started here"):
        library.retry(job)


def test_too_many_failures_stop_a_retry_and_the_rate_may_be_set_for_once(job, tmp_path, cluster):
    tight = ("limits.error_sample=1", "limits.max_error_rate=0.1", "engine.kind=engines:FailingSecondsEngine")
    with pytest.raises(TooManyFaults, match="BAD_LOGITS"):
        library.retry(load(job, MENDED, *tight), client=cluster)
    words = [f"--set={word}" for word in (MENDED, *tight)]
    code, out, err = batchrun("retry", str(job), *words, "--max-error-rate", "1")
    assert code == 3, err
    assert re.search(rf"BAD_LOGITS {len(long_rows())}, e\.g\. in\.parquet:\d+: (?!BAD)", out)
    assert "`batchrun retry` runs them again" in out
    code, out, _ = batchrun("status", str(job))
    assert f"BAD_LOGITS {len(long_rows())}, e.g. in.parquet:" in out


@pytest.mark.timeout(280)
def test_a_killed_retry_leaves_old_or_new_parts_and_goes_on(job, tmp_path, cluster):
    before = bytes_of(tmp_path)
    slow = ["--set", MENDED, "--set", "engine.kind=engines:SecondsEngine", "--set", "cluster.slots=1"]
    process = start("retry", str(job), *slow, BATCHRUN_TEST_DELAY="0.6")
    deadline = time.monotonic() + 120
    while not (replaced_since(tmp_path, before) and staged_for_others(tmp_path, before)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    with pytest.raises(LeaseHeld):
        library.retry(load(job, MENDED), client=cluster)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    replaced = replaced_since(tmp_path, before)
    assert 0 < len(replaced) < 3
    between = answers(tmp_path / "out")
    assert between["text"].to_pylist() == texts(), "each row once, whatever moment it is read at"
    kept = [i for i in range(ROWS) if i not in long_rows()]
    assert between.take(kept)["answer"].to_pylist() == [texts()[i] for i in kept]
    found = status(load(job))
    assert (found.complete, found.retrying, found.retries) == (False, True, 1)
    assert "`batchrun retry` goes on" in "\n".join(found.lines())
    assert "a retry has not finished" in "; ".join(verify(load(job)).found.problems)
    clean(load(job))
    assert staged_for_others(tmp_path, before), "what the retry staged is still needed"
    done = bytes_of(tmp_path)
    result = library.retry(load(job, MENDED), client=cluster)
    assert result.failed == 0
    assert result.requests + result.reused < len(long_rows()), "replaced parts are left alone"
    assert result.reused > 0
    assert {name: data for name, data in bytes_of(tmp_path).items() if name in replaced} == {
        name: done[name] for name in replaced
    }
    assert answers(tmp_path / "out")["answer"].to_pylist() == texts()
    assert verify(load(job)).exit_code == ExitCode.COMPLETE
    assert len(manifest_of(tmp_path)["retries"]) == 1


def test_the_command_has_the_exit_codes_of_a_run(job, tmp_path):
    code, out, err = batchrun("retry", str(job), "--json")
    assert (code, json.loads(out)["failed"]) == (3, len(long_rows())), err
    code, out, err = batchrun("retry", str(job), "--set", "generation.temperature=0.5")
    assert code == 2
    assert "generation.temperature: 0.0 -> 0.5" in err
    code, out, err = batchrun("retry", str(job), "--set", MENDED, "--json")
    assert (code, json.loads(out)["ok"]) == (0, ROWS), err
