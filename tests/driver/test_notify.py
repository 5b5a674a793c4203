"""A webhook hears once that a run has ended, and never keeps it from ending."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import batchrun as library
from batchrun.driver import notify
from batchrun.errors import ChangedError, Interrupted, JobError
from batchrun.job.job import Job
from jobs import batchrun, load, write_job


class Hook:
    """A server that keeps what it is told; `status` is its answer, `slow` seconds late."""

    def __init__(self) -> None:
        self.told: list[dict[str, object]] = []
        self.status, self.slow = 200, 0.0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.told.append(json.loads(body))
                time.sleep(hook.slow)
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/T0/s3cret-path"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Hook]:
    one = Hook()
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_a_complete_run_is_told_once_and_one_that_finds_it_complete_too(tmp_path, tiny_llama, cluster, hook):
    job = load(write_job(tmp_path, tiny_llama, notify={"url": hook.url}))
    result = library.run(job, client=cluster)
    (told,) = hook.told
    assert {
        "status": "complete",
        "exit_code": 0,
        "rows": 60,
        "ok": 60,
        "requests": 60,
    }.items() <= told.items()
    assert told["output_tokens"] == result.output_tokens
    assert str(told["text"]).startswith(f"{tmp_path.name}: complete, 60 of 60 rows answered in ")
    library.run(job, client=cluster)
    assert [one["requests"] for one in hook.told] == [60, 0]


def test_an_interrupted_run_and_a_refused_one_are_told_too(tmp_path, tiny_llama, cluster, hook):
    engine = {"kind": "engines:SecondsEngine"}
    job = load(write_job(tmp_path, tiny_llama, engine=engine, notify={"url": hook.url}), "limits.max_rows=4")
    with pytest.raises(Interrupted):
        library.run(job, client=cluster)
    with pytest.raises(ChangedError):
        library.run(load(tmp_path / "job.yaml", "generation.max_new_tokens=3"), client=cluster)
    assert [(told["status"], told["exit_code"]) for told in hook.told] == [("interrupted", 4), ("refused", 2)]
    assert "max_rows" in str(hook.told[0]["error"])


@pytest.mark.parametrize(
    ("settings", "slack"), [({}, False), ({"format": "slack"}, True), ({"format": "json"}, False)]
)
def test_slack_gets_a_message_and_everybody_else_the_facts(
    tmp_path, tiny_llama, cluster, hook, settings, slack
):
    job = load(write_job(tmp_path, tiny_llama, rows=3, notify={"url": hook.url, **settings}))
    library.run(job, client=cluster)
    assert ([*hook.told[0]] == ["text"]) is slack
    assert "3 of 3 rows" in str(hook.told[0]["text"])


def test_an_address_of_slack_is_known_by_itself(tmp_path, tiny_llama):
    path = write_job(tmp_path, tiny_llama)
    job = load(path, "notify.url=https://hooks.slack.com/services/T/B/x")
    assert job.notify is not None
    assert job.notify.for_slack
    with pytest.raises(JobError, match="https://"):
        load(path, "notify.url=ftp://there")


@pytest.mark.parametrize("how", ["refuses", "slow", "gone"])
def test_a_webhook_that_fails_is_a_warning_within_its_time(
    tmp_path, tiny_llama, cluster, hook, monkeypatch, caplog, how
):
    caplog.set_level("WARNING")
    monkeypatch.setattr(notify, "SECONDS", 0.5)
    url = "http://127.0.0.1:9/s3cret-path" if how == "gone" else hook.url
    hook.status, hook.slow = (500 if how == "refuses" else 200), (5.0 if how == "slow" else 0.0)
    job = load(write_job(tmp_path, tiny_llama, rows=3, notify={"url": url}))
    assert library.run(job, client=cluster).ok == 3
    assert "notify.url was not told" in caplog.text
    assert "s3cret-path" not in caplog.text


def test_the_address_is_shown_nowhere(tmp_path, tiny_llama, hook):
    hook.status = 500
    path = write_job(tmp_path, tiny_llama, rows=3, notify={"url": hook.url})
    assert "s3cret" not in repr(load(path))
    code, out, err = batchrun("run", str(path))
    assert code == 0
    assert "notify.url was not told" in err
    assert len(hook.told) == 1
    shown = (
        out
        + err
        + "".join(
            file.read_text(errors="replace") for file in (tmp_path / "out").rglob("*") if file.is_file()
        )
    )
    assert "s3cret" not in shown
    assert Job.load(path).notify is not None
