"""Columns beside the answer that a job asks for, from the job's setting to Parquet."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError
from jobs import answers, load, write_job

ROWS = 12
TOKEN = pa.struct({"token_id": pa.int32(), "token": pa.string(), "logprob": pa.float32()})


def test_log_probabilities_are_columns_and_the_same_from_both_engines(tmp_path, tiny_llama, cluster):
    tables = {}
    for kind in ("padded", "paged"):
        path = tmp_path / kind
        path.mkdir()
        job = write_job(
            path, tiny_llama, rows=ROWS, engine={"kind": kind}, answer={"logprobs": 2},
            generation={"max_new_tokens": 6},
        )  # fmt: skip
        library.run(job, client=cluster)
        assert verify(load(job)).found.passed
        tables[kind] = answers(path / "out")
    padded, paged = tables["padded"], tables["paged"]
    assert padded.schema.equals(paged.schema)
    assert padded.column_names[-3:] == ["answer_logprobs", "answer_top_logprobs", "answer_mean_logprob"]
    assert paged.schema.field("answer_logprobs").type == pa.list_(pa.float32())
    assert paged.schema.field("answer_top_logprobs").type == pa.list_(pa.list_(TOKEN))
    assert paged["answer"].to_pylist() == padded["answer"].to_pylist()
    for one, other in zip(paged.to_pylist(), padded.to_pylist(), strict=True):
        assert one["status"] == other["status"] == "ok"
        np.testing.assert_allclose(one["answer_logprobs"], other["answer_logprobs"], atol=1e-4)
        assert len(one["answer_logprobs"]) == len(one["answer_top_logprobs"]) == one["output_tokens"]
        assert one["answer_mean_logprob"] == pytest.approx(np.mean(one["answer_logprobs"]), abs=1e-4)
        for chosen, likeliest in zip(one["answer_logprobs"], one["answer_top_logprobs"], strict=True):
            # Greedy: the chosen token is the likeliest.
            assert [token["logprob"] for token in likeliest] == sorted(
                (token["logprob"] for token in likeliest), reverse=True
            )
            assert likeliest[0]["logprob"] == pytest.approx(chosen, abs=1e-4)
            assert all(isinstance(token["token"], str) for token in likeliest)
    with pytest.raises(ChangedError, match="logprobs"):
        library.run(load(tmp_path / "paged/job.yaml", "answer.logprobs=3"), client=cluster)
