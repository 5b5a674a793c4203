"""What `plan` says of other orders of the rows and of the template's fields, and when it says nothing."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import make_model

from batchrun.commands.plan import lines, preview
from batchrun.driver.prepare import prepare
from batchrun.estimate.order import Orders, orders
from batchrun.estimate.sample import sample
from batchrun.job.prompt import PromptSettings
from batchrun.prompt.template import leading_columns, literal_text, plain_fields
from jobs import load, write_job

ROWS, PART, DOCS = 4000, 200, 25


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def job(tmp_path, tiny_llama):
    """Short questions about 25 documents of 600 characters in random order, in partitions of 200 rows."""
    path = write_job(
        tmp_path,
        tiny_llama,
        engine={"kind": "paged"},
        prompt={"template": "{{ doc }} {{ text }}", "max_bytes": 5000, "truncate": "right"},
        output={"rows_per_part": PART},
    )
    chance = random.Random(0)
    docs = [f"{i:02} {chance.randbytes(300).hex()}" for i in range(DOCS)]
    table = {
        "doc": [chance.choice(docs) for _ in range(ROWS)],
        "text": [f"{i:05} is the question" for i in range(ROWS)],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet", row_group_size=500)
    return path


def test_what_the_order_of_rows_would_save_is_told_and_comes_true(job):
    """Nearly all of 25 documents are in each partition of rows as they stand."""
    found = orders(prepare(load(job)))
    question, doc = 21, 604
    # Row groups of 500 rows are cut into 3.
    now = 24 * DOCS * doc + ROWS * question
    then = DOCS * doc + ROWS * question
    assert found.prefix_saved == pytest.approx(1 - then / now, abs=0.03)
    assert (found.rows, found.is_ordered, found.move) == (ROWS, False, None)
    (line,) = found.lines()
    assert line.startswith(
        f"input.order: prefix would save about {found.prefix_saved:.0%} of the prompt tokens"
    )
    assert "up to 24 times" in line
    ordered = orders(prepare(load(job, "input.order=prefix")))
    assert ordered.prefix_saved == pytest.approx(found.prefix_saved, abs=0.05)
    assert ordered.lines()[0].startswith("input.order: prefix saves about")
    shown = str(lines(preview(load(job))))
    assert line in shown


def test_an_order_that_saves_nothing_is_warned_about(job):
    (warning,) = orders(prepare(load(job, "input.order=prefix", "prompt.template={{ text }}"))).lines()
    assert warning.startswith("warning: input.order: prefix saves hardly any prompt tokens here (about 0%)")
    assert orders(prepare(load(job, "prompt.template={{ text }}"))).lines() == []


def test_a_field_that_repeats_belongs_in_front(job):
    found = orders(prepare(load(job, "prompt.template=Answer {{ text }} from {{ doc }}")))
    assert (found.move.field, found.move.before) == ("doc", "text")
    assert "put {{ doc }} before {{ text }}: about" in str(found.lines())
    assert found.move.saved == pytest.approx(
        1 - (24 * DOCS * 604 + ROWS * 27) / (ROWS * (604 + 27)), abs=0.05
    )


def test_the_padded_engine_shares_nothing_and_so_nothing_is_said(job, tmp_path):
    assert orders(prepare(load(job, "engine.kind=padded"))) is None
    encoder = make_model("t5", tmp_path / "t5")
    assert orders(prepare(load(job, "engine.kind=auto", f"model.name={encoder}"))) is None


def test_rows_that_are_copied_anyway_are_not_counted_as_saved(job, tmp_path):
    table = pq.read_table(tmp_path / "in.parquet").slice(0, 500)
    pq.write_table(pa.concat_tables([table] * 8), tmp_path / "in.parquet", row_group_size=500)
    alone = orders(prepare(load(job, "input.limit=500")))
    assert orders(prepare(load(job))).prefix_saved == pytest.approx(alone.prefix_saved)
    sampled = orders(prepare(load(job, "generation.temperature=1.0")))
    assert sampled.prefix_saved > alone.prefix_saved + 0.05


def test_much_reading_is_warned_about():
    found = Orders(1, True, 0.5, 25.0, 5 << 30, None)
    assert any("a worker reads 5.0 GiB for each partition" in line for line in found.lines())


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ({"template": "A {{ a }} b {{ b }}."}, ["a", "b"]),
        ({"template": "{{a}}{{ b }}{{c}}"}, ["a", "b", "c"]),
        ({"template": "{{ a }}, {{ b }}, {{ a }}"}, []),
        ({"template": "{{ a | trim }} {{ b }}"}, []),
        ({"template": "{% if a %}{{ b }}{% endif %} {{ c }}"}, []),
        ({"template": "{% for x in a %}{{ x }}{% endfor %}{{ b }}"}, []),
        ({"template": "{% set x = a %}{{ x }} {{ b }}"}, []),
        ({"column": "a"}, []),
        ({"messages": [message("system", "Be."), message("user", "{{ a }} {{ b }}")]}, ["a", "b"]),
        ({"messages": [message("system", "{{ a }}"), message("user", "{{ b }} {{ c }}")]}, []),
        ({"messages": [message("user", "{{ a }} {{ b }}")], "tools": {"column": "c"}}, []),
    ],
)
def test_only_fields_that_can_change_places_are_advised_on(prompt, fields):
    assert plain_fields(PromptSettings(**prompt)) == fields


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ({"template": "{{ z }} then {{ a }} and {{ z }}"}, ["z", "a"]),
        ({"template": "{% if z == 'x' %}{{ b }}{% else %}{{ a }}{% endif %}"}, ["z", "b", "a"]),
        ({"template": "{% for x in z %}{{ x.y }}{{ a }}{% endfor %}"}, ["z", "a"]),
        ({"column": "z"}, ["z"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "{{ z }}"},
                    {"role": "system", "content": "{{ b }}"},
                ],
                "tools": {"column": "t"},
            },
            ["b", "t", "z"],
        ),
    ],
)
def test_leading_columns_stand_as_the_prompt_comes_to_them(prompt, columns):
    assert leading_columns(PromptSettings(**prompt)) == columns


def test_the_templates_own_text_behind_its_first_field():
    assert (
        literal_text(PromptSettings(template="Read: {{ a }}\nSay {% if b %}yes{% endif %}.")) == "\nSay yes."
    )
    assert literal_text(PromptSettings(column="a")) == ""


@pytest.mark.parametrize("how", [[], ["input.limit=777"], ['input.filters=[["text", "<", "02000 is"]]']])
def test_a_sample_of_rows_in_order_is_like_one_of_rows_as_they_stand(job, how):
    plain = sample(prepare(load(job, *how)), 300)
    found = sample(prepare(load(job, "input.order=prefix", *how)), 300)
    assert found.rows == plain.rows == 300
    assert sorted(found.lengths) == pytest.approx(sorted(plain.lengths), abs=2)
