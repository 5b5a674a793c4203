"""A run's column of what the model thought: beside every answer, through interruptions, retries and checks."""

from __future__ import annotations

import html
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun as library
from batchrun.commands.plan import lines, preview
from batchrun.commands.verify import verify
from batchrun.driver.retry import retry
from batchrun.errors import ChangedError, Interrupted, OutputError
from batchrun.telemetry.progress import Progress
from jobs import answers, dataset, load, write_job

ROWS = 40
NEW_TOKENS = 22
HEAD, END = "<plan>", "</plan>"
JOINED = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


def messages(last: str) -> list[Any]:
    texts = [HEAD + "{{ text }}", END + "{{ kind }}" + last]
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


def job_of(folder: Path, model: Path, **sections: Any) -> Path:
    """The engine answers with its prompt, in tokens of a byte: thoughts, then the answer, and some are cut."""
    return write_job(
        folder, model, rows=ROWS,
        prompt={"template": None, "messages": messages("{{ id }}"), "chat_template": JOINED},
        generation={"max_new_tokens": NEW_TOKENS},
        answer={"reasoning": "plan", "reasoning_markers": [HEAD, END]},
        limits={"max_error_rate": 1},
        **sections,
    )  # fmt: skip


def expected(retried: bool = False) -> list[dict[str, Any]]:
    """By row; those without an id have no prompt until they are `retried`."""
    rows = []
    for row in dataset(ROWS).to_pylist():
        if row["id"] is None and retried:
            row["id"] = 0
        if row["id"] is None:
            rows.append({"answer": None, "plan": None, "plan_tokens": None, "status": "failed"})
            continue
        whole = f"{HEAD}{row['text']}{END}{row['kind']}{row['id']}"[:NEW_TOKENS]
        thought, closing, answer = whole.removeprefix(HEAD).partition(END)
        tokens = len(whole) - len(answer)
        rows.append(
            {
                "answer": answer if closing else None,
                "plan": thought.strip(),
                "plan_tokens": tokens,
                "status": "ok",
            }
        )
    return rows


def check(out: Path, retried: bool = False) -> None:
    table = answers(out)
    assert table.select(["answer", "plan", "plan_tokens", "status"]).to_pylist() == expected(retried)
    assert table.schema.field("plan_tokens").type == pa.int32()
    reasons = set(table.filter(pa.compute.is_null(table["answer"]))["finish_reason"].to_pylist())
    assert reasons == ({"length"} if retried else {"length", "error"})
    assert table.select(dataset(ROWS).column_names).equals(dataset(ROWS))


def test_a_run_that_goes_on_has_the_thoughts_of_every_row_once(tmp_path, tiny_llama, cluster) -> None:
    job = job_of(tmp_path, tiny_llama, output={"failed": "failed"}, engine={"kind": "engines:SecondsEngine"})
    stop = threading.Event()

    def on_progress(progress: Progress) -> None:
        if list((tmp_path / "out").rglob("*.chunk")):
            stop.set()

    with pytest.raises(Interrupted):
        library.run(job, client=cluster, stop=stop, on_progress=on_progress)
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.reused > 0
    check(tmp_path / "out")
    assert verify(load(job)).found.problems == []
    page = html.unescape((tmp_path / "out/_job/report.html").read_text())
    assert f"{HEAD}row 1 x" in page
    assert f"{END}b" in page, "each part is shown"
    failed = pq.read_table(next((tmp_path / "out/failed").iterdir()))
    assert not {"plan", "plan_tokens", "answer"} & set(failed.column_names)
    with pytest.raises(ChangedError, match=r"answer.reasoning: plan -> why"):
        library.run(load(job, "answer.reasoning=why"), client=cluster)
    with pytest.raises(ChangedError, match="a retry cannot change which rows and columns there are"):
        retry(load(job, "answer.reasoning=why"), client=cluster, allow=["answer"])


def test_a_retry_keeps_the_thoughts_of_rows_that_have_an_answer(tmp_path, tiny_llama, cluster) -> None:
    job = job_of(tmp_path, tiny_llama)
    library.run(job, client=cluster)
    check(tmp_path / "out")
    fixed = load(job, f"prompt.messages={json.dumps(messages('{{ id or 0 }}'))}")
    retry(fixed, client=cluster, allow=["prompt.messages"])
    check(tmp_path / "out", retried=True)
    assert verify(fixed).found.problems == []


def test_a_plan_shows_the_columns_and_refuses_names_that_are_taken(tmp_path, tiny_llama) -> None:
    job = job_of(tmp_path, tiny_llama)
    found = preview(load(job))
    assert [*found["columns"]][-2:] == ["plan", "plan_tokens"]
    assert found["columns"]["plan_tokens"] == "int32"
    assert "error (string), plan (string), plan_tokens (int32)" in str(lines(found))
    with pytest.raises(OutputError, match="name 'kind' of the reasoning column is taken") as caught:
        preview(load(job, "answer.reasoning=kind"))
    assert caught.value.where == "output.columns"
