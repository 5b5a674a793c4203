"""Every example job runs as it stands: offline, on the small model, and from its own folder's data."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from distributed import Client

import batchrun
from batchrun.job.job import Job

JOBS = Path(__file__).parents[2] / "jobs"
EXAMPLES = sorted(JOBS.glob("*.yaml"))
INSTANT = "engine.kind=batchrun.engine.instant:InstantEngine"
sys.path[:0] = [str(JOBS), str(JOBS / "data")]

import evaluate  # noqa: E402
import texts  # noqa: E402


def test_the_data_are_what_their_script_writes() -> None:
    assert pq.read_table(JOBS / "data/reviews.parquet").equals(texts.reviews())
    assert pq.read_table(JOBS / "data/questions.parquet").equals(texts.questions())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_answers_its_rows_and_names_its_columns(
    path: Path, tmp_path: Path, cluster: Client
) -> None:
    own = [f"output.path={tmp_path}", "input.limit=3"]
    job = Job.load(path, own)
    if not job.answer.is_constrained and not job.answer.is_scored:
        # It repeats its prompts, which are of no form that is asked for.
        job = Job.load(path, [*own, INSTANT])
    result = batchrun.run(job, client=cluster)
    assert (result.rows, result.ok) == (3, 3)
    table = pq.read_table(tmp_path / "data")
    assert job.output.column("answer") in table.column_names
    assert all(table[job.output.column("answer")].to_pylist())


def test_the_second_step_of_the_pipeline_reads_what_the_first_one_wrote(
    tmp_path: Path, cluster: Client
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    own = [f"output.path={first}", "input.limit=4", INSTANT]
    batchrun.run(Job.load(JOBS / "pipeline/1-summarise.yaml", own), client=cluster)
    own = [f"output.path={second}", f"input.path={first}/data", INSTANT]
    job = Job.load(JOBS / "pipeline/2-classify.yaml", own)
    assert batchrun.run(job, client=cluster).ok == 4
    one, two = pq.read_table(first / "data"), pq.read_table(second / "data")
    assert two["complaint"].to_pylist() == one["complaint"].to_pylist()
    assert two["review_id"].to_pylist() == one["review_id"].to_pylist()


def test_the_pipelines_second_step_looks_where_the_first_one_writes() -> None:
    first, second = (Job.load(JOBS / "pipeline" / name) for name in ("1-summarise.yaml", "2-classify.yaml"))
    assert second.input.path == f"{first.output.path}/data"


def test_a_real_model_is_one_line(tmp_path: Path) -> None:
    for path in [*EXAMPLES, *JOBS.glob("pipeline/*.yaml")]:
        model = yaml.safe_load(path.read_text())["model"]
        assert list(model) == ["name"], f"{path.name}: everything but the name is left to the model"
        assert (path.parent / model["name"] / "config.json").exists()


def test_the_score_counts_right_answers_by_topic(tmp_path: Path) -> None:
    table = texts.questions()
    answers = [f" {truth.upper()}.\n" for truth in table["truth"].to_pylist()]
    answers[0], answers[-1] = "57", None
    (tmp_path / "data").mkdir()
    counts = {"arithmetic": (5, 6), "geography": (6, 6), "language": (4, 4), "nature": (3, 4)}
    pq.write_table(table.append_column("answer", [answers]), tmp_path / "data/part.parquet")
    scores = evaluate.score(tmp_path)
    assert {topic: (one.agreed, one.asked) for topic, one in scores.items()} == counts
    assert {topic: (one.right, one.asked) for topic, one in scores.items()} == counts
    # Two of three samples say the same.
    samples = [[answer, "something else", answer] for answer in answers]
    pq.write_table(table.append_column("answer", [samples]), tmp_path / "data/part.parquet")
    scores = evaluate.score(tmp_path)
    assert {topic: (one.agreed, one.asked) for topic, one in scores.items()} == counts
    assert scores["geography"].right == pytest.approx(4)


def test_a_classification_has_the_probability_of_each_label(tmp_path: Path, cluster: Client) -> None:
    job = Job.load(JOBS / "classify.yaml", [f"output.path={tmp_path}", "input.limit=4"])
    result = batchrun.run(job, client=cluster)
    assert (result.ok, result.output_tokens) == (4, 0)
    for row in pq.read_table(tmp_path / "data").to_pylist():
        found = row["label_probabilities"]
        assert list(found) == job.answer.choices
        assert sum(found.values()) == pytest.approx(1)
        assert row["label"] == max(found, key=found.__getitem__)


def test_the_shipped_model_runs_an_example_by_itself(tmp_path: Path, cluster: Client) -> None:
    own = [f"output.path={tmp_path}", "input.limit=2"]
    result = batchrun.run(Job.load(JOBS / "extract.yaml", own), client=cluster)
    assert result.ok == 2
    facts = pq.read_table(tmp_path / "data")["facts"].to_pylist()
    assert all(isinstance(one["returned"], bool) for one in facts)
    assert "padded" in {stats.engine for stats in result.engines}
