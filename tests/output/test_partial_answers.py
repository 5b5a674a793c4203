"""Begun answers in storage: they save tokens, and whatever becomes of them costs no more than tokens."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import JOB_HASH, SCHEMA, answers, attempt, carried, faulty_folder, layout, output, store_of

from batchrun.output import chunk, clean, state
from batchrun.output.attempt import PartialAnswer
from batchrun.output.chunk import BadChunk, Origin

ROWS = 6


def begun(**lengths: int) -> dict[int, PartialAnswer]:
    """Rows "r0", "r1", ... with so many tokens of their answers."""
    return {
        int(r[1:]): PartialAnswer(3, np.arange(n, dtype=np.int32) + 10 * int(r[1:]))
        for r, n in lengths.items()
    }


def opened(folder, plan, rows=ROWS):
    one = attempt(folder, plan, 0, rows, "next")
    assert one.open() is None
    return one


def test_a_later_attempt_finds_the_longest_of_what_earlier_ones_let_go_of():
    folder, _ = faulty_folder()
    plan = layout(1)
    first, second = attempt(folder, plan, 0, ROWS, "a"), attempt(folder, plan, 0, ROWS, "b")
    first.open()
    second.open()
    first.keep(begun(r0=2, r1=5))
    second.keep(begun(r1=3, r2=1))
    found = opened(folder, plan).begun
    assert {row: (one.prompt_tokens, one.tokens.tolist()) for row, one in found.items()} == {
        0: (3, [0, 1]),
        1: (3, [10, 11, 12, 13, 14]),
        2: (3, [20]),
    }
    first.keep({})
    assert len(folder.list(plan.stage(0))) == 2, "nothing to keep is no object"


def test_begun_answers_keep_the_values_of_their_tokens_and_those_of_before_there_were_any_are_taken_up():
    folder, _ = faulty_folder()
    plan = layout(1)
    one = attempt(folder, plan, 0, ROWS, "a")
    one.open()
    values = {
        "logprobs": np.array([-0.5, -1.5], np.float32),
        "top_tokens": np.array([[1, 2], [3, 4]], np.int32),
    }
    one.keep({2: PartialAnswer(3, np.array([7, 8], np.int32), values)} | begun(r1=4))
    found = opened(folder, plan).begun
    assert found[1].values == {}
    assert {name: column.tolist() for name, column in found[2].values.items()} == {
        name: column.tolist() for name, column in values.items()
    }
    origin = Origin(plan.plan_hash, JOB_HASH, 0)
    before = pa.table({"row": [4], "prompt_tokens": [3], "tokens": [[9]]})
    table = chunk.decode_partial(chunk.encode(before, origin, "old"), origin, ROWS)
    assert table.to_pylist() == [{"row": 4, "prompt_tokens": 3, "tokens": [9], "values": None}]


def test_begun_answers_cover_no_row_and_are_swept_with_the_chunks():
    folder, _ = faulty_folder()
    plan = layout(1)
    one = attempt(folder, plan, 0, ROWS, "a")
    one.open()
    one.add(answers(0, [0]))
    one.flush()
    one.keep(begun(r1=4))
    assert state.scan(folder, plan).streaming.tolist() == [True]
    one = opened(folder, plan)
    assert one.missing.tolist() == [1, 2, 3, 4, 5]
    one.add(answers(0, one.missing))
    one.seal(carried(0, ROWS), SCHEMA)
    assert not folder.list(plan.stage(0))


def test_begun_answers_that_outlive_their_part_are_swept_by_the_next_attempt_and_by_clean():
    folder, _ = faulty_folder()
    plan = layout(1)
    late = attempt(folder, plan, 0, ROWS, "late")
    late.open()
    one = opened(folder, plan)
    one.add(answers(0, range(ROWS)))
    one.seal(carried(0, ROWS), SCHEMA)
    late.keep(begun(r1=4))
    assert attempt(folder, plan, 0, ROWS, "next").open() is not None
    assert not folder.list(plan.stage(0))
    late.keep(begun(r1=4))
    clean.delete(folder, clean.leftovers(output(folder, plan)))
    assert not folder.list(plan.stage(0))


@given(cut=st.integers(0, 2000), flip=st.integers(0, 2000))
def test_a_damaged_one_costs_its_tokens_and_nothing_else(cut, flip):
    folder, store = faulty_folder()
    plan = layout(1)
    one = attempt(folder, plan, 0, ROWS, "a")
    one.open()
    one.add(answers(0, [0]))
    one.flush()
    one.keep(begun(r1=4, r2=2))
    key = next(key for key in store.objects if key.endswith(".partial"))
    data = bytearray(store.objects[key])
    data[flip % len(data)] ^= 1
    store.objects[key] = bytes(data[: cut % len(data)]) if cut % 2 else bytes(data)
    again = opened(folder, plan)
    assert again.missing.tolist() == [1, 2, 3, 4, 5]
    assert not again.begun


@pytest.mark.parametrize("change", [{"plan_hash": "x"}, {"job_hash": "x"}, {"partition": 1}])
def test_one_of_another_plan_job_or_partition_is_no_tokens_of_ours(change):
    folder, _ = faulty_folder()
    plan = layout(1)
    one = attempt(folder, plan, 0, ROWS, "a")
    one.open()
    one.keep(begun(r1=4))
    (key,) = folder.list(plan.stage(0))
    origin = Origin(**{"plan_hash": plan.plan_hash, "job_hash": JOB_HASH, "partition": 0})
    data = folder.read(key)
    assert chunk.decode_partial(data, origin, ROWS).num_rows == 1
    other = Origin(**{"plan_hash": plan.plan_hash, "job_hash": JOB_HASH, "partition": 0, **change})
    with pytest.raises(BadChunk, match="another plan, job or partition"):
        chunk.decode_partial(data, other, ROWS)
    with pytest.raises(BadChunk):
        chunk.decode(data, origin, ROWS)
    with pytest.raises(BadChunk, match="outside"):
        chunk.decode_partial(data, origin, 1)
    assert store_of(folder).objects
