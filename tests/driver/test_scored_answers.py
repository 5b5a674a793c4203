"""Jobs that score what is given in place of generating: a column's texts, and the choices of a classification."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client
from transformers import AutoModelForCausalLM, AutoTokenizer

import batchrun as library
from batchrun.commands.plan import preview
from batchrun.commands.verify import verify
from batchrun.driver.retry import retry
from batchrun.errors import ExitCode, Interrupted, JobError, Refused
from jobs import answers, load, write_job

ROWS = 24
CHOICES = ["yes", "no", "no way", "né", "rather good", "rather bad"]


def job_of(folder: Path, model: Path, kind: str, answer: dict[str, Any], **sections: Any) -> Path:
    path = folder / kind
    path.mkdir(exist_ok=True)
    return write_job(path, model, rows=ROWS, engine={"kind": kind}, answer=answer, **sections)


class Plain:
    """The model by itself, a prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).double()

    def score(self, prompt: str, text: str) -> np.ndarray:
        before, tokens = self.ids(prompt), self.ids(text)
        found = self.logprobs(before + tokens)[len(before) - 1 : -1]
        return found[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()

    def choices(self, prompt: str, texts: list[str]) -> np.ndarray:
        """How often each is drawn, token by token among those that some choice has there, the end included."""
        ways = [[*self.ids(text), self.tokenizer.eos_token_id] for text in texts]
        found = []
        for way in ways:
            total = 0.0
            for place, token in enumerate(way):
                open_ways = [other for other in ways if other[:place] == way[:place]]
                allowed = sorted({other[place] for other in open_ways if len(other) > place})
                if len(allowed) > 1:
                    last = self.logprobs(self.ids(prompt) + way[:place])[-1]
                    total += float(last[token] - last[allowed].logsumexp(-1))
            found.append(np.exp(total))
        return np.array(found)


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Plain:
    return Plain(tiny_llama)


def test_a_columns_texts_are_scored_alike_by_both_engines_and_by_a_plain_forward_pass(
    tmp_path: Path, tiny_llama: Path, cluster: Client, plain: Plain
) -> None:
    tables = {}
    for kind in ("padded", "paged"):
        path = job_of(
            tmp_path, tiny_llama, kind, {"score": "kind"}, prompt={"template": "{{ tags }} {{ text }}"}
        )
        table = pq.read_table(path.parent / "in.parquet")
        kinds = [None if i == 5 else "" if i == 6 else f"{'wort ' * (i % 4)}{i}" for i in range(ROWS)]
        table = table.set_column(table.column_names.index("kind"), "kind", [kinds])
        pq.write_table(table, path.parent / "in.parquet", row_group_size=10)
        result = library.run(path, client=cluster)
        assert (result.failed, result.output_tokens) == (2, 0)
        assert verify(load(path)).exit_code == ExitCode.FAILED_ROWS
        tables[kind] = answers(path.parent / "out")
    schema = tables["paged"].schema
    assert schema.equals(tables["padded"].schema)
    names = ("answer", "kind_mean_logprob", "kind_perplexity", "kind_tokens")
    kinds_of = [pa.float64(), pa.float32(), pa.float64(), pa.int32()]
    assert [schema.field(name).type for name in names] == kinds_of
    padded = tables["padded"].to_pylist()
    for i, (one, other) in enumerate(zip(tables["paged"].to_pylist(), padded, strict=True)):
        if i in (5, 6):
            assert [one[name] for name in names] == [None] * 4
            assert one["error"].startswith(
                ("NULL_PROMPT: column 'kind'", "EMPTY_PROMPT: column 'kind'")[i - 5]
            )
            continue
        exact = plain.score(f"{one['tags']} {one['text']}", one["kind"])
        for row in (one, other):
            assert row["answer"] == pytest.approx(exact.sum(), abs=1e-4)
            assert row["kind_mean_logprob"] == pytest.approx(exact.mean(), abs=1e-4)
            assert row["kind_perplexity"] == pytest.approx(np.exp(-exact.mean()), rel=1e-4)
            assert (row["kind_tokens"], row["output_tokens"]) == (len(exact), 0)
            assert (row["finish_reason"], row["status"]) == ("stop", "ok")


def test_choices_have_the_probabilities_with_which_they_would_be_drawn(
    tmp_path: Path, tiny_llama: Path, cluster: Client, plain: Plain
) -> None:
    tables = {}
    for kind in ("padded", "paged"):
        answer = {"choices": CHOICES, "probabilities": True}
        path = job_of(tmp_path, tiny_llama, kind, answer, output={"columns": {"answer": "label"}})
        result = library.run(path, client=cluster)
        assert (result.ok, result.output_tokens) == (ROWS, 0)
        assert verify(load(path)).found.passed
        tables[kind] = answers(path.parent / "out")
    schema = tables["paged"].schema
    assert schema.equals(tables["padded"].schema)
    assert schema.field("label").type == pa.dictionary(pa.int32(), pa.string())
    assert schema.field("label_probabilities").type == pa.struct([(text, pa.float64()) for text in CHOICES])
    for one, other in zip(tables["paged"].to_pylist(), tables["padded"].to_pylist(), strict=True):
        exact = plain.choices(one["text"], CHOICES)
        for row in (one, other):
            found = np.array([row["label_probabilities"][text] for text in CHOICES])
            np.testing.assert_allclose(found, exact, atol=1e-5)
            assert found.sum() == pytest.approx(1.0)
            assert row["label"] == CHOICES[int(exact.argmax())]


# Lists that rows have, every other one from the fourth on with something that is no choice.
A, B, C = ["yes", "no", "no way"], ["rather good", "rather bad"], ["né"]
OWN = [A, B, C, None, A, [], B, ["a", None], C, ["a", ""], A, ["a", "a"], B, ["<eos>", "b"], C]
NOT_CHOICES = {
    3: "is null",
    5: "is an empty list",
    7: "has a text that is null, empty or there twice",
    9: "has a text that is",
    11: "has a text that is",
    13: "is not scored: its tokenizer writes",
}


def test_choices_of_a_column_are_each_rows_own(
    tmp_path: Path, tiny_llama: Path, cluster: Client, plain: Plain
) -> None:
    tables = {}
    for kind in ("padded", "paged"):
        answer = {"choices": {"column": "labels"}, "probabilities": True}
        parse = {"special_tokens": "parse"}
        path = job_of(tmp_path, tiny_llama, kind, answer, prompt=parse, limits={"max_error_rate": 1.0})
        table = pq.read_table(path.parent / "in.parquet")
        labels = pa.array([OWN[i % len(OWN)] for i in range(ROWS)], pa.list_(pa.string()))
        pq.write_table(table.append_column("labels", labels), path.parent / "in.parquet", row_group_size=10)
        columns = preview(load(path))["columns"]
        assert columns["answer"] == "string"
        assert "list<" in columns["answer_probabilities"]
        assert "double" in columns["answer_probabilities"]
        result = library.run(path, client=cluster)
        assert result.output_tokens == 0
        assert verify(load(path)).exit_code == ExitCode.FAILED_ROWS
        tables[kind] = answers(path.parent / "out")
    assert tables["paged"].schema.equals(tables["padded"].schema)
    for i, (one, other) in enumerate(
        zip(tables["paged"].to_pylist(), tables["padded"].to_pylist(), strict=True)
    ):
        own = OWN[i % len(OWN)]
        if (why := NOT_CHOICES.get(i % len(OWN))) is not None:
            assert one["error"] == other["error"]
            assert one["error"].startswith(f"INVALID_SETTING: choices: column 'labels' {why}")
            assert (one["answer"], one["answer_probabilities"]) == (None, None)
            continue
        exact = plain.choices(one["text"], own)
        for row in (one, other):
            np.testing.assert_allclose(row["answer_probabilities"], exact, atol=1e-5)
            assert (row["answer"], row["status"]) == (own[int(exact.argmax())], "ok")
    fixed = load(path, "answer.choices.column=labels")
    before = answers(path.parent / "out")
    retry(fixed, client=cluster)
    assert answers(path.parent / "out").drop_columns("error").equals(before.drop_columns("error"))
    assert verify(fixed).found.passed


def test_special_tokens_in_a_rows_own_choices_are_text_where_the_job_says_so(
    tmp_path: Path, tiny_llama: Path, cluster: Client
) -> None:
    answer = {"choices": {"column": "tags"}}
    path = job_of(tmp_path, tiny_llama, "padded", answer, prompt={"special_tokens": "text"})
    table = pq.read_table(path.parent / "in.parquet")
    own = pa.array([["<eos>"]] * ROWS, pa.list_(pa.string()))
    pq.write_table(
        table.set_column(table.column_names.index("tags"), "tags", own), path.parent / "in.parquet"
    )
    assert library.run(path, client=cluster).ok == ROWS
    assert set(answers(path.parent / "out")["answer"].to_pylist()) == {"<eos>"}


def test_scored_rows_survive_a_stop_a_resume_and_a_retry(
    tmp_path: Path, tiny_llama: Path, cluster: Client
) -> None:
    answer = {"choices": CHOICES, "probabilities": True}
    whole = job_of(tmp_path, tiny_llama, "padded", answer)
    library.run(whole, client=cluster)
    expected = answers(whole.parent / "out").drop_columns("error")
    stop = threading.Event()
    (tmp_path / "again").mkdir()
    path = write_job(
        tmp_path / "again", tiny_llama, rows=ROWS, answer=answer, engine={"kind": "padded"},
        prompt={"max_bytes": 12}, limits={"max_error_rate": 1.0},
    )  # fmt: skip
    with pytest.raises(Interrupted):
        library.run(path, client=cluster, stop=stop, on_progress=lambda progress: stop.set())
    library.run(path, client=cluster)
    lost = [row for row in answers(tmp_path / "again/out").to_pylist() if row["status"] == "failed"]
    assert lost
    assert all(row["answer_probabilities"] is None for row in lost)
    retry(load(path, "prompt.max_bytes=1000"), client=cluster)
    found = answers(tmp_path / "again/out").drop_columns("error")
    same = [name for name in expected.column_names if name != "answer_probabilities"]
    assert found.select(same).equals(expected.select(same))
    for one, other in zip(found.to_pylist(), expected.to_pylist(), strict=True):
        assert one["answer_probabilities"] == pytest.approx(other["answer_probabilities"], abs=1e-6)


def test_the_raw_text_stands_beside_a_typed_answer_and_shows_what_was_cut(
    tmp_path: Path, tiny_llama: Path, cluster: Client
) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}
    path = job_of(
        tmp_path, tiny_llama, "padded", {"schema": schema, "raw": "text_of_it"},
        generation={"max_new_tokens": 40, "temperature": 1.5}, limits={"max_error_rate": 1.0},
    )  # fmt: skip
    library.run(path, client=cluster)
    table = answers(path.parent / "out")
    assert table.schema.field("text_of_it").type == pa.string()
    wanted = load(path).answer.format
    assert wanted is not None
    rows = table.to_pylist()
    assert {row["status"] for row in rows} == {"ok", "failed"}
    for row in rows:
        if row["status"] == "failed":
            assert row["answer"] is None
            assert row["text_of_it"]
        else:
            assert wanted.values([row["text_of_it"]]).to_pylist() == [row["answer"]]
    assert verify(load(path)).found.passed


@pytest.mark.parametrize(
    ("answer", "generation", "said"),
    [
        ({"probabilities": True}, {}, "probabilities are of choices"),
        (
            {"choices": ["a", "b"], "probabilities": True},
            {"temperature": 1},
            "leave generation.temperature at 0",
        ),
        ({"choices": ["Yes", "yes"], "probabilities": True}, {}, "may not differ in case alone"),
        ({"choices": ["a", "b"], "probabilities": True, "logprobs": 1}, {}, "generates none"),
        ({"score": "kind"}, {"samples": 2, "temperature": 1}, "samples are of generated answers"),
        ({"score": "kind", "choices": ["a"]}, {}, "leave out schema, regex and choices"),
        ({"score": "kind", "reasoning": "thoughts"}, {}, "generates none"),
        ({"raw": "text_of_it"}, {}, "leave it out here"),
        ({"choices": {"column": "tags"}, "raw": "text_of_it"}, {}, "leave it out here"),
        ({"choices": {"column": "tags"}, "reasoning": "why"}, {}, "choices of a column generates none"),
        ({"choices": {"column": "tags"}}, {"temperature": 1}, "leave generation.temperature at 0"),
        (
            {"choices": {"column": "tags"}},
            {"samples": 2, "temperature": 1},
            "samples are of generated answers",
        ),
        ({"choices": {"colum": "tags"}}, {}, "answer.choices"),
        ({"choices": ["a", "a"]}, {}, "answer.choices: give texts that are not empty, each once"),
        ({"choices": []}, {}, "answer.choices"),
    ],
)
def test_what_cannot_go_together_is_refused_with_what_to_leave_out(
    tmp_path: Path, tiny_llama: Path, answer: dict[str, Any], generation: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):
        load(job_of(tmp_path, tiny_llama, "padded", answer, generation=generation))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"score": "kinds"}, "did you mean 'kind'"),
        ({"score": "id"}, "not text"),
        (
            {"choices": {"column": "tag"}},
            "did you mean 'tags'",
        ),
        ({"choices": {"column": "text"}}, "column 'text' is string, not lists of texts"),
    ],
)
def test_a_column_that_cannot_be_scored_is_refused_before_anything_runs(
    tmp_path: Path, tiny_llama: Path, cluster: Client, answer: dict[str, Any], said: str
) -> None:
    path = job_of(tmp_path, tiny_llama, "padded", answer)
    with pytest.raises(Refused, match=said):
        library.run(path, client=cluster)
    assert not (path.parent / "out/data").exists()
