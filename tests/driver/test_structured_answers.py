"""Jobs with answers of a schema: typed columns, rows that were cut, retries and restarts, as their user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
import yaml
from distributed import Client
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.errors import ExitCode
from jobs import batchrun, load, write_job

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["ä", "b", None]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "day": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "day"],
}
TYPE = pa.struct(
    {
        "name": pa.string(),
        "kind": pa.dictionary(pa.int32(), pa.string()),
        "size": pa.int64(),
        "day": pa.date32(),
    }
)
ROWS = 40
# As many that a model does both in what it draws, wherever their file lies: its path is part of their seeds.
MANY = 120


def job_of(
    folder: Path, model: Path, answer: dict[str, Any], new_tokens: int = 90, engine: str = "padded"
) -> Path:
    return write_job(
        folder,
        model,
        rows=ROWS,
        answer=answer,
        engine={"kind": engine},
        generation={"max_new_tokens": new_tokens, "temperature": 1.5},
        limits={"max_error_rate": 1.0},
    )


def column(folder: Path) -> pa.Table:
    return ds.dataset(folder / "out/data").to_table().combine_chunks()


@pytest.mark.parametrize("engine", ["padded", "paged"])
def test_a_schema_gives_a_typed_column_and_a_retry_completes_it(
    tmp_path: Path, tiny_llama: Path, cluster: Client, engine: str
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    job = job_of(tmp_path, tiny_llama, {"schema": "schema.json"}, new_tokens=58, engine=engine)
    assert library.run(load(job), client=cluster).exit_code == ExitCode.FAILED_ROWS
    first = column(tmp_path)
    assert first.schema.field("answer").type == TYPE
    failed = [row for row in first.to_pylist() if row["status"] == "failed"]
    assert failed
    assert all(row["error"].startswith("INVALID_OUTPUT: the answer was cut") for row in failed)
    assert all(row["answer"] is None and row["finish_reason"] == "length" for row in failed)
    assert verify(load(job)).exit_code == ExitCode.FAILED_ROWS

    longer = load(job, "generation.max_new_tokens=300")
    assert library.retry(longer, errors=["INVALID_OUTPUT"], client=cluster).exit_code == ExitCode.COMPLETE
    second = column(tmp_path)
    assert second.schema.field("answer").type == TYPE
    assert second["status"].to_pylist() == ["ok"] * ROWS
    kept = [(a, b) for a, b in zip(first.to_pylist(), second.to_pylist(), strict=True) if a["status"] == "ok"]
    assert kept
    assert all(a["answer"] == b["answer"] for a, b in kept)
    assert verify(load(job)).exit_code == ExitCode.COMPLETE


@pytest.mark.parametrize(
    ("answer", "kind", "engine"),
    [
        ({"choices": ["yes", "no", "né"]}, pa.dictionary(pa.int32(), pa.string()), "paged"),
        ({"regex": "[A-Z]{2}-[0-9]"}, pa.string(), "padded"),
    ],
)
def test_choices_and_expressions_give_texts(
    tmp_path: Path,
    tiny_llama: Path,
    cluster: Client,
    answer: dict[str, Any],
    kind: pa.DataType,
    engine: str,
) -> None:
    job = job_of(tmp_path, tiny_llama, answer, engine=engine)
    assert library.run(load(job), client=cluster).exit_code == ExitCode.COMPLETE
    found = column(tmp_path)
    assert found.schema.field("answer").type == kind
    assert set(found["finish_reason"].to_pylist()) == {"stop"}


def test_a_schema_that_is_not_supported_is_refused_before_anything_runs(
    tmp_path: Path, tiny_llama: Path
) -> None:
    job = job_of(tmp_path, tiny_llama, {"schema": {"properties": {"a": {"not": {}}}}})
    code, _, said = batchrun("run", str(job))
    assert code == ExitCode.REFUSED
    assert "answer.schema at /properties/a: not is not supported; list what is allowed" in said
    assert not (tmp_path / "out").exists()


def test_a_pydantic_model_is_a_schema(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "receipts.py").write_text(
        "from pydantic import BaseModel\nclass Receipt(BaseModel):\n    total: int\n    paid: bool = False\n"
    )
    job = load(job_of(tmp_path, tiny_llama, {"schema": "receipts:Receipt"}))
    assert job.answer.format is not None
    assert job.answer.format.type == pa.struct({"total": pa.int64(), "paid": pa.bool_()})


def test_what_an_answer_has_to_be_is_part_of_an_outputs_identity(tmp_path: Path, tiny_llama: Path) -> None:
    path = job_of(tmp_path, tiny_llama, {"schema": SCHEMA})
    assert load(path).deciding()["answer"] == {"schema": SCHEMA}
    free = yaml.safe_load(path.read_text())
    del free["answer"]
    path.write_text(yaml.safe_dump(free))
    assert "answer" not in load(path).deciding()


# Opens the thoughts of some rows in their prompts, closes those of others, and leaves it to the model for the rest.
THINKING = """{% for m in messages %}{{ m['content'] }}{% endfor %}
{%- if messages[0]['content'].endswith('a') %}<think>
{%- elif '1' in messages[0]['content'] %}<think></think>{% endif %}"""
NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that opens and closes thoughts often, each by a token."""
    folder = make_model("llama", tmp_path_factory.mktemp("thinker"))
    tokenizer = make_tokenizer()
    opening, closing = tokenizer.vocab_size, tokenizer.vocab_size + 1
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[opening] *= 2
        model.lm_head.weight[closing] *= 2
    model.save_pretrained(folder)
    return folder


def thinking_job(folder: Path, model: Path, engine: str, **answer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    messages = [{"role": "user", "content": "{{ text }}{{ kind }}"}]
    return write_job(
        folder, model, rows=MANY, answer={"reasoning": "why", **answer}, engine={"kind": engine},
        prompt={"template": None, "messages": messages, "chat_template": THINKING},
        generation={"max_new_tokens": 16, "temperature": 1.5}, limits={"max_error_rate": 1.0},
    )  # fmt: skip


def test_a_schema_holds_behind_what_a_model_thinks(tmp_path: Path, thinker: Path, cluster: Client) -> None:
    # Both of the same input: a row's place in it decides its noise.
    job, tables = thinking_job(tmp_path, thinker, "padded", schema=NUMBER, raw="said"), {}
    for engine in ("paged", "padded"):
        out = tmp_path / ("out" if engine == "padded" else engine)
        own = [f"engine.kind={engine}", f"output.path={out}"]
        assert library.run(load(job, *own), client=cluster).exit_code == ExitCode.FAILED_ROWS
        assert verify(load(job, *own)).found.passed
        tables[engine] = ds.dataset(out / "data").to_table().combine_chunks()
    assert tables["padded"].equals(tables["paged"])
    assert tables["paged"].schema.field("answer").type == pa.struct({"n": pa.int64()})
    rows = tables["paged"].to_pylist()
    good = [row for row in rows if row["status"] == "ok"]
    for row in good:
        assert json.loads(row["said"]) == row["answer"]
        assert 0 <= row["answer"]["n"] <= 99
        assert (row["why"] is None) == (row["why_tokens"] == 0)
        assert "</think>" not in row["said"]
        if row["kind"] == "a":
            assert row["why"] is not None, "opened by the template"
        elif "1" in row["text"]:
            assert row["why"] is None, "closed by the template"
    free = [row for row in good if row["kind"] == "b" and "1" not in row["text"]]
    assert {row["why"] is None for row in free} == {True, False}, "the model's own choice"
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["finish_reason"] for row in failed} == {"length"}
    assert {row["error"] for row in failed} <= {
        "INVALID_OUTPUT: the answer was cut before its end",
        "INVALID_OUTPUT: the model was cut while it was thinking",
    }
    assert any("thinking" in row["error"] for row in failed)
    library.retry(load(job, "generation.max_new_tokens=150"), client=cluster)
    assert verify(load(job)).found.passed
    after = column(job.parent).to_pylist()
    assert sum(row["status"] == "ok" for row in after) > len(good)
    assert [row for row, old in zip(after, rows, strict=True) if old["status"] == "ok"] == good


def test_markers_that_are_no_tokens_are_refused_beside_a_form(tmp_path: Path, thinker: Path) -> None:
    job = thinking_job(
        tmp_path, thinker, "padded", choices=["a", "b"], reasoning_markers=["<plan>", "</plan>"]
    )
    code, _, said = batchrun("run", str(job))
    assert code == ExitCode.REFUSED
    assert "its tokenizer has no tokens for '<plan>'" in said
    assert not (tmp_path / "out/data").exists()
