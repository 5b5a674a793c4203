"""Airflow 3: one task a day. Retries only what can be fixed by trying again; the same day is safe to run again.

batchrun has to be on the PATH of the Airflow workers; they need no GPU where the job names a cluster.
"""

from __future__ import annotations

import signal
import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

JOB = "/opt/batchrun/jobs/classify.yaml"
LAKE = "s3://lake"


@dag(
    schedule="30 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["batchrun"],
)
def classify_reviews() -> None:
    @task(retries=6, retry_delay=timedelta(minutes=10))
    def classify(logical_date: datetime | None = None) -> str:
        # Airflow fills in the date; a run at 01:30 is about the day before.
        assert logical_date is not None
        day = (logical_date - timedelta(days=1)).strftime("%Y-%m-%d")
        output = f"{LAKE}/answers/day={day}/"
        places = ["--set", f"input.path={LAKE}/reviews/day={day}/", "--set", f"output.path={output}"]
        with subprocess.Popen(["batchrun", "run", JOB, *places]) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()  # the task was stopped: let the run stage what it holds
                raise
        if code in (4, -signal.SIGKILL):
            raise AirflowException("interrupted; the next try goes on from there")
        if code not in (0, 3):
            raise AirflowFailException(f"batchrun ended with code {code}: trying again would not help")
        return output

    classify()


classify_reviews()
