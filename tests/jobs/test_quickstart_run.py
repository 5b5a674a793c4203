"""The shipped model's accuracy through the whole runner: batching, padding, order, resume and commit cost no answer."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

import batchrun
from batchrun.errors import Interrupted
from batchrun.job.job import Job
from batchrun.telemetry.progress import Progress

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import orders  # noqa: E402

ROWS = 100


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orders") / "unseen.parquet"
    pq.write_table(orders.to_table(orders.rows(orders.TEST_SEED, ROWS)), path, row_group_size=32)
    return path


def job(path: Path, output: Path, *overrides: str) -> Job:
    own = [f"input.path={path}", f"output.path={output}", "output.rows_per_part=50", "output.flush_rows=16"]
    return Job.load(QUICKSTART / "job.yaml", [*own, *overrides])


def answers(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in sorted((output / "data").iterdir())])


def test_a_stopped_and_resumed_run_reads_97_of_100_orders_right_in_every_field(
    unseen: Path, tmp_path: Path, cluster: Client
) -> None:
    stop = threading.Event()

    def on_progress(progress: Progress) -> None:
        if 0 < progress.rows_done < progress.rows:
            stop.set()

    small_batches = job(unseen, tmp_path, "engine.kind=padded", "engine.batch_tokens=4096")
    with pytest.raises(Interrupted):
        batchrun.run(small_batches, client=cluster, stop=stop, on_progress=on_progress)
    result = batchrun.run(small_batches, client=cluster)
    assert 0 < result.requests < ROWS, "what was staged is not generated again"
    table = answers(tmp_path)
    assert table["expected"].equals(pq.read_table(unseen)["expected"]), "in the input's order"
    assert set(table["finish_reason"].to_pylist()) == {"stop"}
    assert table.schema.field("answer").type.field("quantity").type == pa.int64()
    assert table.schema.field("answer").type.field("date").type == pa.date32()
    said = [json.dumps(answer, default=str) for answer in table["answer"].to_pylist()]
    assert orders.score(said, table["expected"].to_pylist()) >= 0.97


def test_the_paged_engine_gives_the_padded_engines_answers(
    unseen: Path, tmp_path: Path, cluster: Client
) -> None:
    for kind in ("padded", "paged"):
        own = [f"engine.kind={kind}", "input.limit=24", "answer={}"]
        batchrun.run(job(unseen, tmp_path / kind, *own), client=cluster)
    padded, paged = answers(tmp_path / "padded"), answers(tmp_path / "paged")
    assert padded.equals(paged)
