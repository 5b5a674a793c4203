"""Rows that have adapters of their own, as their user runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter

import batchrun as library
from batchrun.commands.plan import lines, preview
from batchrun.commands.verify import verify
from batchrun.driver.prepare import prepare
from batchrun.errors import ChangedError, InputError
from jobs import answers, load, write_job

ROWS = 24
NAMES = ["short", None, "long", "short", "lang", "long"] * 4


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    """Rows of two adapters, of none and of one that there is not; half of them with the same prompts."""
    make_adapter(tmp_path / "a", tiny_llama, seed=1)
    make_adapter(tmp_path / "b", tiny_llama, ["q_proj", "up_proj", "down_proj"], rank=9, seed=2)
    job = write_job(
        tmp_path,
        tiny_llama,
        rows=ROWS,
        generation={"max_new_tokens": 12},
        limits={"max_error_rate": 1.0},
        prompt={"template": "{{ text[:5] }}"},
    )
    table = pq.read_table(tmp_path / "in.parquet").append_column("which", pa.array(NAMES).dictionary_encode())
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=10)
    return job


def _run(job: Path, client: Any, *changes: str) -> list[dict[str, Any]]:
    own = load(job, *changes)
    library.run(own, client=client)
    assert verify(own).found.passed
    rows = answers(Path(own.output.path)).select(["answer", "status", "error", "output_tokens"])
    return rows.to_pylist()


def test_each_row_gets_the_answer_of_the_job_with_its_adapter_merged(job, tmp_path, cluster):
    """By the padded engine; that of both is the same is held by the engines' own tests."""
    engine = "engine.kind=padded"
    of_rows = ("model.adapters={short: a, long: b}", "model.adapter_column=which")
    together = _run(job, cluster, engine, *of_rows, "output.path=together")
    apart = {
        name: _run(job, cluster, engine, f"model.adapter={place}", f"output.path={name}")
        for name, place in (("short", "a"), ("long", "b"), (None, "null"))
    }
    for number, (name, row) in enumerate(zip(NAMES, together, strict=True)):
        if name in apart:
            assert row == apart[name][number]
        else:
            assert row["error"] == (
                "INVALID_SETTING: adapter is 'lang' in column 'which': model.adapters has short, long"
            )
    assert len({rows[0]["answer"] for rows in apart.values()}) == 3
    with pytest.raises(ChangedError, match="model: "):
        library.run(
            load(job, engine, "model.adapters={short: b, long: a}", of_rows[1], "output.path=together"),
            client=cluster,
        )
    with pytest.raises(ChangedError, match=r"model\.adapter_column"):
        library.run(load(job, engine, "output.path=together"), client=cluster)


def test_scored_rows_have_their_own_adapters(job, tmp_path, cluster):
    score = ("engine.kind=paged", "answer.score=text", "model.adapter_column=which")
    found = {}
    for name, places in (("both", "{short: a, long: b}"), ("other", "{short: b, long: a}")):
        own = load(job, f"model.adapters={places}", *score, f"output.path={name}")
        library.run(own, client=cluster)
        found[name] = answers(tmp_path / name)["answer"].to_pylist()
    for name, one, other in zip(NAMES, found["both"], found["other"], strict=True):
        assert (one == other) == (name in (None, "lang"))


def test_a_column_that_cannot_hold_names_is_refused(job):
    with pytest.raises(InputError, match=r"model\.adapter_column: column 'id' is int64, and not texts"):
        prepare(load(job, "model.adapters={short: a}", "model.adapter_column=id"))


def test_the_plan_describes_each_adapter(job):
    found = preview(load(job, "model.adapters={short: a, long: b}", "model.adapter_column=which"))
    shown = [line for line in lines(found) if str(line).startswith("adapter ")]
    assert not [line for line in lines(found) if "model.quantization" in str(line)], (
        "which they do not go with"
    )
    # Of the same prompts, those for one adapter.
    assert found["prompt_tokens"]["duplicates"] == _duplicates(NAMES)
    assert shown == [
        "adapter short: LoRA of rank 4 on 8 layers (down_proj, o_proj, q_proj, v_proj), "
        "for rows whose which is short",
        "adapter long: LoRA of rank 9 on 6 layers (down_proj, q_proj, up_proj), for rows whose which is long",
    ]


def _duplicates(names: list[str | None]) -> int:
    """Prompts are the first five letters of "row 0" to "row 23"; rows of a wrong name have none."""
    prompts = [(name, f"row {number}"[:5]) for number, name in enumerate(names) if name != "lang"]
    return len(prompts) - len(set(prompts))
