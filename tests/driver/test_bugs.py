"""A bug in batchrun's own code ends the run at once and is reported as one; no row is blamed for it."""

from __future__ import annotations

import json

import pytest

from batchrun.commands.status import status
from batchrun.errors import ExitCode, is_bug
from batchrun.storage import Folder
from batchrun.telemetry import record
from jobs import batchrun, check_complete, load, start_program, write_job

ROWS = 60
PRELOAD = "def dask_setup(worker):\n    import batchrun.{module} as broken\n    broken.{name} = None\n"


@pytest.fixture
def broken(tmp_path, tiny_llama):
    """Runs a job on a local cluster whose workers have lost a function of batchrun's: code and standard error."""

    def run(module: str, name: str, *words: str) -> tuple[int, str]:
        preload = tmp_path / "preload.py"
        preload.write_text(PRELOAD.format(module=module, name=name))
        job = str(write_job(tmp_path, tiny_llama, rows=ROWS))
        preloads = json.dumps([str(preload)])
        code, _, err = batchrun("run", job, *words, DASK_DISTRIBUTED__WORKER__PRELOAD=preloads)
        return code, err

    return run


def is_reported(code: int, err: str, where: str, what: str) -> bool:
    last = err.strip().splitlines()[-1]
    assert code == ExitCode.FAILED, err
    assert last.startswith(f"error: {where}:"), err
    assert f"unexpected {what}: " in last, last
    assert "report it" in last, last
    return True


def test_a_bug_in_a_task_ends_the_run_at_once_and_its_traceback_is_shown_and_recorded(broken, tmp_path):
    code, err = broken("worker.generation", "answered", "--debug")
    assert is_reported(code, err, "batchrun/worker/generation.py", "TypeError")
    assert "lost" not in err, "no attempt is repeated, no row suspected"
    (run,) = record.read_all(Folder(str(tmp_path / "out")))
    assert (run.outcome, run.message[:20]) == ("failed", "unexpected TypeError")
    for text in (err, run.traceback):
        for frame in ("in run_partition", "in _settle", "TypeError: 'NoneType' object is not callable"):
            assert frame in text


def test_what_was_finished_before_a_bug_is_staged_and_goes_on_once_it_is_fixed(broken, tmp_path):
    code, err = broken("output.part", "summarize")
    assert is_reported(code, err, "batchrun/output/attempt.py", "TypeError")
    found = status(load(tmp_path / "job.yaml"))
    assert found.rows_committed == 0
    assert found.rows_staged >= 20, "those of the partition whose part could not be built"
    code, out, err = batchrun("run", str(tmp_path / "job.yaml"), "--json")
    assert code == ExitCode.COMPLETE, err
    assert json.loads(out)["requests"] == ROWS - found.rows_staged
    check_complete(tmp_path / "out", ROWS)


def test_a_bug_in_the_driver_is_told_the_same_way(tmp_path, tiny_llama, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'batchrun' in sys.orig_argv:\n"
        "    import batchrun.driver.stalls\n"
        "    del batchrun.driver.stalls.Stalls.forget\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_program("run", str(write_job(tmp_path, tiny_llama)))
    _, err = process.communicate(timeout=120)
    assert is_reported(process.returncode, err, "batchrun/driver/dispatch.py", "AttributeError")


def raised(code: str, module: str) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        exec(code, {"__name__": module, "__builtins__": __builtins__})
    return caught.value


@pytest.mark.parametrize(
    ("code", "module", "bug"),
    [
        ("x = None; x()", "batchrun.worker.task", True),
        ("import batchrun.nothing", "batchrun.worker.task", True),
        ("import json; json.dumps({1, 2})", "batchrun.worker.task", True),
        ("import pyarrow.compute as pc; pc.equal(1)", "batchrun.worker.task", True),
        ("x = None; x()", "transformers_modules.tokenizer", False),
        ("import json; json.dumps({1, 2})", "transformers_modules.tokenizer", False),
        ("x = None; x()", "s3fs.core", False),
        ("x = None; x()", "__main__", False),
        ("open('/nowhere/at/all')", "batchrun.worker.task", False),
        ("import pyarrow as pa; pa.array(['a']).cast(pa.int8())", "batchrun.worker.task", False),
    ],
)
def test_only_batchruns_own_code_has_batchruns_bugs(code, module, bug):
    assert is_bug(raised(code, module)) is bug
