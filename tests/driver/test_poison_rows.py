"""Rows that kill their engine are found exactly, innocents never, at a bounded number of engine starts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.driver.poison_rows import HOPELESS, MAX_POISON_ROWS, STRIKES, Bisection, PoisonRowSearch
from batchrun.errors import BatchrunError, TooManyFaults

ROWS = st.integers(1, 3000)


def bisect(rows: int, poison: set[int], accidents: set[int] = frozenset()) -> tuple[list[int], int]:
    """Runs trials until none is left. A trial with a poison row in it is lost, and so is the n-th trial for each n of
    `accidents`; some rows before the first poison one are durable by then. The condemned, and attempts lost."""
    search, missing, isolated_attempts, lost = Bisection(), set(range(rows)), 0, 0
    while rows := search.next_rows(missing):
        guilty = [row for row in rows if row in poison]
        if guilty or isolated_attempts in accidents:
            missing -= set(rows[: rows.index(guilty[0]) // 2]) if guilty else set()
            search.lost()
            lost += 1
        else:
            missing -= set(rows)
        isolated_attempts += 1
    assert missing == set(search.poison_rows), "every row is durable or condemned"
    return search.poison_rows, lost


@given(rows=ROWS, data=st.data())
def test_any_set_of_poison_rows_is_found_exactly_at_log2_starts_each(rows, data):
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=8))
    poison_rows, lost = bisect(rows, poison)
    assert sorted(poison_rows) == sorted(poison)
    assert lost <= len(poison) * (math.ceil(math.log2(rows)) + STRIKES)


@given(rows=ROWS, data=st.data())
def test_losses_that_are_no_rows_fault_condemn_nobody(rows, data):
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=3))
    accidents = data.draw(st.sets(st.integers(0, 60), max_size=12))
    # Never STRIKES of them in a row: that is what a row is condemned by.
    accidents = {n for n in accidents if n % STRIKES}
    poison_rows, _ = bisect(rows, poison, accidents)
    assert set(poison_rows) >= poison
    innocents = set(poison_rows) - poison
    assert not innocents


def test_a_partition_is_a_suspect_after_three_losses_without_progress_in_between():
    suspected = PoisonRowSearch()
    for _ in range(5):
        assert not suspected.lost(7, "a kill", in_flight=3)
        assert not suspected.lost(7, "a kill", in_flight=3)
        suspected.progress(7)
    assert [suspected.lost(7, "a kill", in_flight=3) for _ in range(STRIKES)] == [False, False, True]
    assert list(suspected.open) == [7]


def test_an_engine_that_cannot_be_loaded_is_the_machines_fault_once_no_worker_can():
    suspected = PoisonRowSearch()
    for _ in range(STRIKES):
        suspected.unloaded("bad", ["bad", "good"], "no memory")
    suspected.progress(0)  # the good one's
    for _ in range(2 * STRIKES - 1):
        suspected.unloaded("bad", ["bad", "good"], "no memory")
    with pytest.raises(BatchrunError, match="no row is to blame") as caught:
        suspected.unloaded("good", ["bad", "good"], "no memory")
    assert "no memory" in str(caught.value)
    assert not suspected.open


def test_a_run_in_which_nothing_gets_done_stops_early():
    suspected = PoisonRowSearch()
    for n in range(HOPELESS):
        suspected.lost(n, "a broken kernel", in_flight=3)
    with pytest.raises(TooManyFaults, match="without a finished row; the last one: a broken kernel"):
        suspected.lost(HOPELESS, "a broken kernel", in_flight=3)


def test_one_blow_to_a_large_cluster_is_no_reason_to_stop():
    suspected = PoisonRowSearch()
    for n in range(300):
        suspected.lost(n, "the network", in_flight=300)


@given(rows=st.integers(200, 2000))
def test_more_crashing_rows_than_can_be_rows_fault_trip_the_breaker(rows):
    suspected, missing, lost = PoisonRowSearch(), set(range(rows)), 0
    for _ in range(STRIKES):
        suspected.lost(0, "a broken kernel", in_flight=1)

    def go_on() -> None:
        nonlocal lost
        while isolated := suspected.next_rows(0, missing):
            if any(row % 8 == 3 for row in isolated):
                lost += 1
                suspected.lost_alone(0, isolated, "a broken kernel")
            else:
                missing.difference_update(isolated)

    with pytest.raises(TooManyFaults):
        go_on()
    assert lost <= (MAX_POISON_ROWS + 1) * (math.log2(rows) + 1 + STRIKES)


def test_a_partition_that_cannot_be_sealed_is_an_error_and_no_rows_fault():
    suspected = PoisonRowSearch()
    for _ in range(STRIKES):
        suspected.lost(0, "a kill", in_flight=1)
    for _ in range(STRIKES - 1):
        assert suspected.next_rows(0, []) == []
        suspected.lost_alone(0, [], "a kill")
    with pytest.raises(BatchrunError, match="though each of its rows was tried"):
        suspected.lost_alone(0, [], "a kill")
    assert not suspected.open[0].poison_rows
