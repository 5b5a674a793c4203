"""Templates that only put columns between texts: the same texts and faults as Jinja's, without a process for them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from batchrun.errors import FaultCode, RowFault
from batchrun.job.prompt import PromptSettings
from batchrun.prompt import template
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.template import RowTemplate, Templates
from batchrun.prompt.tokens import PromptBuilder, unguarded

SOURCES = [
    "{{ a }}",
    "x{{ a }}\n",
    "{{ a }}{{b}}{{ a }}",
    "line\r\n{{ a }}{# a comment #}\r\n",
    "  {{- a -}}  y {{ b }}",
    "{% raw %}{{ a }}{% endraw %}{{ b }}",
    "no column",
    "",
]
TEXTS = st.none() | st.text(st.characters(codec="utf-8"), max_size=8)


def of(source: str | list[str]) -> Templates:
    if isinstance(source, str):
        return Templates(PromptSettings(template=source), unguarded)
    messages: Any = [{"role": "user", "content": text} for text in source]
    return Templates(PromptSettings(messages=messages), unguarded)


@settings(max_examples=60)
@given(
    sources=st.lists(st.sampled_from(SOURCES), min_size=1, max_size=3),
    rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=5),
)
def test_texts_and_faults_are_those_of_jinja(
    sources: list[str], rows: list[tuple[str | None, str | None]]
) -> None:
    templates = of(sources)
    names = ["a", "b"]
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(2)]
    assert len(templates.plain) == len(sources)
    got = templates.render(pa.RecordBatch.from_arrays(columns, names))
    read = [tuple(row[names.index(name)] for name in templates.columns) for row in rows]
    assert got == RENDERER.rows(templates.sources, templates.columns, read)


EXPRESSIONS = ["{{ a|trim }}", "{{ a.b }}", "{{ 'a' }}", "{{ a ~ a }}", "{{ a() }}", "{% if a %}{% endif %}"]


@pytest.mark.parametrize("source", [*EXPRESSIONS, "{{ self }}", "{{ range }}"])
def test_whatever_can_take_long_or_fail_is_left_to_the_process(source: str) -> None:
    assert RowTemplate(source, "prompt.template").plain is None


def test_a_job_without_expressions_over_texts_needs_no_process(monkeypatch: Any) -> None:
    monkeypatch.setattr(RENDERER, "_ask", None)
    batch = pa.RecordBatch.from_pydict({"t": ["a", None, "c"]})
    settings = PromptSettings(template="say: {{ t }}")
    first, null, last = PromptBuilder(settings, byte_tokenizer(), 4096, 8, batch.schema).render(batch)
    assert (first, last) == ("say: a", "say: c")
    assert isinstance(null, RowFault)
    assert null.code is FaultCode.NULL_PROMPT


def test_numbers_are_printed_by_jinja() -> None:
    batch = pa.RecordBatch.from_pydict({"a": [1, 2], "b": ["x", "y"]})
    assert of("{{ a }}{{ b }}").render(batch) == [["1x"], ["2y"]]


def test_a_text_that_is_too_large_is_its_rows_fault(monkeypatch: Any) -> None:
    monkeypatch.setattr(template, "TEXT", 10)
    batch = pa.RecordBatch.from_pydict({"a": ["12345", "123456"]})
    whole, fault = of("12345{{ a }}").render(batch)
    assert whole == ["1234512345"]
    assert isinstance(fault, RowFault)
    assert fault.code is FaultCode.TEMPLATE_ERROR
