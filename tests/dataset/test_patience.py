"""Reading on: damaged pages are read twice, busy stores waited for, and every row comes once."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.dataset import patience
from batchrun.dataset.patience import read_with_retries
from batchrun.dataset.reader import RowBatch
from batchrun.driver.stalls import Stalls
from batchrun.errors import ChangedError, CorruptInput, FaultCode, RowFault, StorageError

FAULT = RowFault(FaultCode.INPUT_CORRUPT, "a page cannot be decoded")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.0)


class Source:
    """Rows 0, 1, 2, ... in batches; each reading ends with the next of `errors` before the row it names."""

    def __init__(self, rows: int, size: int, errors: list[tuple[int, Exception]]) -> None:
        self.rows, self.size, self.errors, self.readings = rows, size, errors, 0

    def read(self, salvage: bool) -> Iterator[RowBatch]:
        self.readings += 1
        at, error = self.errors.pop(0) if self.errors else (self.rows, None)
        for first in range(0, self.rows, self.size):
            count = min(self.size, self.rows - first)
            fault = None
            if error is not None and first + count > at:
                if not (salvage and isinstance(error, CorruptInput)):
                    raise error
                fault = FAULT
            places = np.arange(first, first + count)
            records = pa.RecordBatch.from_pydict({"n": [None] * count if fault else places.tolist()})
            where = np.zeros_like(places)
            yield RowBatch(first, records, places.astype(np.uint64), where, where, places, fault)


def rows_of(source: Source) -> list[int | None]:
    batches = list(read_with_retries(source.read, "there"))
    ends = np.cumsum([b.records.num_rows for b in batches])
    assert [b.first for b in batches] == [0, *ends[:-1].tolist()]
    ids = [i for b in batches for i in b.row_ids.tolist()]
    assert ids == list(range(source.rows)), "each row once, in order"
    return [n for b in batches for n in b.records["n"].to_pylist()]


BUSY = st.sampled_from(
    [ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("slow"), OSError(errno.EIO, "io")]
)


@given(size=st.integers(1, 5), errors=st.lists(st.tuples(st.integers(0, 12), BUSY), max_size=5))
def test_a_store_that_fails_now_and_then_costs_no_row(size, errors):
    source = Source(13, size, list(errors))
    assert rows_of(source) == list(range(13))


@given(
    size=st.integers(1, 5),
    at=st.integers(0, 12),
    before=st.lists(st.tuples(st.integers(0, 12), BUSY), max_size=2),
)
def test_a_page_that_is_damaged_once_is_read_again_and_whole(size, at, before):
    source = Source(13, size, [*before, (at, CorruptInput("a page"))])
    assert rows_of(source) == list(range(13))


@given(size=st.integers(1, 5), at=st.integers(0, 12), again=st.integers(0, 12))
def test_a_page_that_stays_damaged_is_nulls_with_a_fault(size, at, again):
    source = Source(13, size, [(at, CorruptInput("a page")), (again, CorruptInput("a page"))])
    rows = rows_of(source)
    lost = max(at // size * size, again // size * size)
    assert rows == [*range(lost), *[None] * (13 - lost)]
    assert source.readings == 2


def test_what_waiting_cannot_help_is_said_at_once():
    with pytest.raises(StorageError, match=r"there: the input cannot be read .*denied"):
        rows_of(Source(4, 2, [(2, PermissionError(errno.EACCES, "denied"))]))
    with pytest.raises(ChangedError):
        rows_of(Source(4, 2, [(2, ChangedError("changed"))]))
    with pytest.raises(ZeroDivisionError):
        rows_of(Source(4, 2, [(2, ZeroDivisionError())]))


def test_a_store_that_stays_busy_is_given_up(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.05)
    source = Source(4, 2, [(2, ConnectionResetError(errno.ECONNRESET, "reset"))] * 100_000)
    with pytest.raises(StorageError, match="reset"):
        rows_of(source)


def test_an_attempt_stalls_when_nothing_of_it_moves_for_so_long():
    stalls = Stalls(10)
    assert not any(stalls.stalled(1, ("a", n), now=9.0 * n) for n in range(50)), "it moves, if slowly"
    assert not stalls.stalled(1, ("a", 49), now=451)
    assert not stalls.stalled(2, ("a", 49), now=451), "another one's clock is its own"
    assert stalls.stalled(1, ("a", 49), now=452)
    assert not stalls.stalled(1, ("a", 49), now=453), "said once"
    stalls.forget([1])
    assert not stalls.stalled(2, ("a", 49), now=500), "a new attempt begins anew"
