"""The schedules: parsed by what will parse them, run with stand-ins for what they call, right for every exit code."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from batchrun.errors import ExitCode
from batchrun.job.job import Job

JOBS = Path(__file__).parents[2] / "jobs"
SCHEDULES = JOBS / "schedules"
SCRIPTS = sorted(SCHEDULES.glob("*.sh"))
MANIFESTS = sorted(SCHEDULES.glob("kubernetes-*.yaml"))

# Notes how it was called and ends with the first code in $CODES, the next time with the next one.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
read -r code rest <<< "$(cat "$CODES")"
echo "${rest:-$code}" > "$CODES"
[[ $code != kill ]] || kill -KILL $$
[[ $code != wait ]] || { trap 'exit 4' TERM; sleep 60 > /dev/null 2>&1 & wait; }
exit "$code"
"""


class Machine:
    """A PATH on which batchrun and its friends are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.codes = folder / "calls", folder / "codes"
        self.calls.touch()
        names = ("batchrun", "scontrol", "srun")
        for name in names:
            text = STAND_IN if name != "srun" else '#!/bin/bash\nexec "$@"\n'
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "CALLS": str(self.calls), "CODES": str(self.codes),
                    "LAKE": "s3://lake", "PAUSE": "0"}  # fmt: skip

    def start(self, codes: str, *words: str, **env: str) -> subprocess.Popen[str]:
        self.codes.write_text(codes)
        return subprocess.Popen(words, env={**self.env, **env}, text=True, stderr=subprocess.PIPE)

    def run(self, codes: str, *words: str, **env: str) -> int:
        process = self.start(codes, *words, **env)
        process.communicate(timeout=60)
        return process.returncode

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    ran = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("codes", "ends", "tries"),
    [
        ("0", 0, 1),
        ("3", 0, 1),
        ("1", 1, 1),
        ("2", 2, 1),
        ("4 4 0", 0, 3),
        ("4 3", 0, 2),
        ("4", 4, 5),
        ("4 2", 2, 2),
        ("kill 0", 0, 2),
        ("kill", 4, 5),
    ],
)
def test_the_script_for_cron_tries_again_after_interruptions_and_kills_only(
    machine: Machine, codes: str, ends: int, tries: int
) -> None:
    assert machine.run(codes, str(SCHEDULES / "daily.sh"), "job.yaml", "2026-01-31") == ends
    day = "day=2026-01-31/"
    call = f"batchrun run job.yaml --set input.path=s3://lake/reviews/{day} --set output.path=s3://lake/answers/{day}"
    assert machine.lines() == [call] * tries


def test_the_script_for_cron_takes_yesterday_where_no_day_is_given(machine: Machine) -> None:
    before = datetime.now(UTC)
    assert machine.run("0", str(SCHEDULES / "daily.sh"), "job.yaml") == 0
    days = {(now - timedelta(days=1)).strftime("day=%Y-%m-%d/") for now in (before, datetime.now(UTC))}
    assert any(day in machine.lines()[0] for day in days)


def test_the_script_for_cron_passes_a_signal_on_and_does_not_try_again(machine: Machine) -> None:
    process = machine.start("wait 0", str(SCHEDULES / "daily.sh"), "job.yaml", "2026-01-31")
    deadline = time.monotonic() + 60
    while not machine.lines():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 4
    assert len(machine.lines()) == 1


def test_the_crontab_has_five_times_and_a_command_that_exists() -> None:
    lines = [line for line in (SCHEDULES / "crontab").read_text().splitlines() if line[:1].isdigit()]
    assert lines
    for line in lines:
        times, command = line.split(maxsplit=5)[:5], line.split(maxsplit=5)[5]
        assert all(re.fullmatch(r"[\d*,/-]+", field) for field in times)
        for path in re.findall(r"/opt/batchrun/(jobs/\S+)", command):
            assert (JOBS.parent / path).exists()


@pytest.mark.parametrize(("codes", "ends"), [("0", 0), ("3", 0), ("1", 1), ("2", 2), ("kill", 137)])
def test_a_slurm_array_task_runs_its_own_day(machine: Machine, codes: str, ends: int) -> None:
    env = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "77", "FIRST_DAY": "2026-02-26"}
    assert machine.run(codes, "bash", str(SCHEDULES / "slurm-array.sh"), **env) == ends
    assert len(machine.lines()) == 1
    assert "day=2026-03-01/" in machine.lines()[0]


def test_an_interrupted_slurm_array_task_is_queued_again(machine: Machine) -> None:
    env = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "77", "FIRST_DAY": "2026-02-26"}
    assert machine.run("4 0", "bash", str(SCHEDULES / "slurm-array.sh"), **env) == 0
    assert machine.lines()[1] == "scontrol requeue 77_0"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_manifests_fit_the_schemas_and_heed_the_exit_codes(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.32", strict=True)
        if document["kind"] == "ConfigMap":
            own = ["input.path=s3://lake/x/", "output.path=s3://lake/y/"]
            assert Job.parse(document["data"]["job.yaml"], own).model.name
            continue
        job = document["spec"] if document["kind"] == "Job" else document["spec"]["jobTemplate"]["spec"]
        fatal, disrupted = job["podFailurePolicy"]["rules"]
        assert fatal["onExitCodes"]["values"] == [ExitCode.FAILED, ExitCode.REFUSED]
        assert disrupted["action"] == "Ignore"
        pod = job["template"]["spec"]
        container = pod["containers"][0]
        assert container["command"][:4] == ["tini", "-e", str(int(ExitCode.FAILED_ROWS)), "--"]
        assert pod["securityContext"]["runAsNonRoot"]
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_cronjobs_command_is_about_the_day_before_its_job_whenever_it_is_tried(machine: Machine) -> None:
    document = yaml.safe_load((SCHEDULES / "kubernetes-cronjob.yaml").read_text())
    container = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    scheduled = datetime(2026, 3, 1, 1, 30, tzinfo=UTC)
    name = f"classify-{int(scheduled.timestamp()) // 60}"
    words = [*container["command"][4:], *container["args"]]
    assert machine.run("0", *words, JOB_NAME=name) == 0
    assert "output.path=s3://lake/answers/day=2026-02-28/" in machine.lines()[0]


def test_argo_tries_again_after_interruptions_and_kills_only_and_each_try_is_about_the_same_day(
    machine: Machine,
) -> None:
    flow = yaml.safe_load((SCHEDULES / "argo.yaml").read_text())["spec"]["workflowSpec"]
    template = next(t for t in flow["templates"] if t["name"] == flow["entrypoint"])
    again = template["retryStrategy"]["expression"].split(" || ")
    assert again == [
        'lastRetry.status == "Error"',
        f"asInt(lastRetry.exitCode) == {int(ExitCode.INTERRUPTED)}",
        f"asInt(lastRetry.exitCode) == {128 + signal.SIGKILL}",
    ]
    container = template["container"]
    assert container["command"][:4] == ["tini", "-e", str(int(ExitCode.FAILED_ROWS)), "--"]
    names = {volume["name"] for volume in flow["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert container["env"] == [{"name": "SCHEDULED", "value": "{{workflow.scheduledTime}}"}]
    words = [*container["command"][4:], *container["args"]]
    assert machine.run("0", *words, SCHEDULED="2026-03-01T01:30:00Z") == 0
    assert "output.path=s3://lake/answers/day=2026-02-28/" in machine.lines()[0]


class FailForGood(Exception):
    pass


class Again(Exception):
    pass


@pytest.fixture
def airflow_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The DAG's own task function, with stand-ins for the decorators (Airflow itself is large)."""
    made: dict[str, Any] = {}

    def dag(**options: Any) -> Any:
        made["dag"] = options
        return lambda function: function

    def task(**options: Any) -> Any:
        made["options"] = options

        def decorate(function: Any) -> Any:
            made["task"] = function
            return lambda: None

        return decorate

    sdk = types.ModuleType("airflow.sdk")
    sdk.dag, sdk.task = dag, task  # type: ignore[attr-defined]
    exceptions = types.ModuleType("airflow.sdk.exceptions")
    exceptions.AirflowException, exceptions.AirflowFailException = Again, FailForGood  # type: ignore[attr-defined]
    for name, module in (("airflow", types.ModuleType("airflow")), ("airflow.sdk", sdk),
                         ("airflow.sdk.exceptions", exceptions)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("airflow_dag", SCHEDULES / "airflow_dag.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return made


@pytest.mark.parametrize(
    ("code", "raises"),
    [(0, None), (3, None), (1, FailForGood), (2, FailForGood), (4, Again), ("kill", Again)],
)
def test_airflow_tries_again_after_interruptions_and_kills_only(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, airflow_task: Any, code: int | str, raises: Any
) -> None:
    machine.codes.write_text(str(code))
    for name in ("PATH", "CALLS", "CODES"):
        monkeypatch.setenv(name, machine.env[name])
    task, date = airflow_task["task"], datetime(2026, 3, 1, 1, 30, tzinfo=UTC)
    if raises is None:
        assert task(date) == "s3://lake/answers/day=2026-02-28/"
    else:
        with pytest.raises(raises):
            task(date)
    assert "input.path=s3://lake/reviews/day=2026-02-28/" in machine.lines()[0]
    assert airflow_task["options"]["retries"] > 0


def test_the_dag_uses_arguments_that_airflow_documents() -> None:
    known = {
        "dag": {"schedule", "start_date", "catchup", "max_active_runs", "tags", "dag_id"},
        "task": {"retries", "retry_delay", "execution_timeout", "pool"},
    }
    tree = ast.parse((SCHEDULES / "airflow_dag.py").read_text())
    used = [
        (decorator.func.id, {keyword.arg for keyword in decorator.keywords})
        for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name)
    ]  # fmt: skip
    assert {name for name, _ in used} == set(known)
    for name, arguments in used:
        assert arguments <= known[name]
