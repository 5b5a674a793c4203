"""Pages in fp8 that a prefill brings back to the model's format: those that are read, each once, few at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.paged.attention import widened_pages
from batchrun.engine.paged.attention.widened_pages import WidenedPages
from batchrun.engine.paged.device.shapes import query_spans
from batchrun.engine.paged.device.work import PrefillWork
from batchrun.engine.paged.schedule.batches import PrefillChunk
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import Request

PAGE = 16


@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 30), documents=st.integers(1, 4), most=st.integers(1, 40)
)
def test_every_table_finds_its_own_pages_among_those_that_its_turn_brings_back(
    seed: int, rows: int, documents: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    begins = [rng.choice(np.arange(1, 1000), rng.integers(0, 20), replace=False) for _ in range(documents)]
    news = sorted((int(n) for n in rng.choice([1, 40, 200, 3000], rows)), reverse=True)
    old = [begins[rng.integers(documents)] for _ in news]
    lens = np.array([len(o) * PAGE + n for o, n in zip(old, news, strict=True)])
    need = -(-lens // PAGE)
    tables = rng.integers(2000, 9000, (rows, int(need.max()) + 2)).astype(np.int32)
    for row, pages in enumerate(old):
        tables[row, : len(pages)] = pages
    before = tables.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened_pages, "WIDENED_TOKENS", most * PAGE)
        plan = WidenedPages.of(query_spans(news), tables, news, lens, PAGE)
    assert (tables == before).all()
    spans = [span for turn in plan.spans for span in turn]
    assert [row for first, stop, _ in spans for row in range(first, stop)] == list(range(rows))
    whole = query_spans(news)
    for first, stop, longest in spans:
        assert longest == max(news[first:stop])
        assert any(begin <= first and stop <= end for begin, end, _ in whole)
    assert len(spans) < len(plan.pages) + len(whole)
    for turn, pages in zip(plan.spans, plan.pages, strict=True):
        assert len(set(pages)) == len(pages)
        assert len(pages) <= most or turn[-1][1] - turn[0][0] == 1
        for row in range(turn[0][0], turn[-1][1]):
            found = pages[plan.block_tables[row, : need[row]]]
            assert (found == tables[row, : need[row]]).all()


def test_questions_of_any_length_about_many_documents_bring_few_documents_back_twice() -> None:
    """Forty documents of 100 pages, of which nine fit a turn with the questions, ten for each, in any order."""
    rng = np.random.default_rng(0)
    chunks = []
    for number, document in enumerate(rng.permutation(np.repeat(np.arange(40), 10)).tolist()):
        question = int(rng.integers(1, 3 * PAGE))
        # None ends its prompt, so that no token is to be chosen.
        one = Sequence.of(Request(number, np.zeros(100 * PAGE + question + 1, np.int32), 1))
        own = range(5000 + 4 * number, 5004 + 4 * number)
        one.pages = [*range(1 + 100 * document, 101 + 100 * document), *own]
        chunks.append(PrefillChunk(one, 100 * PAGE, 100 * PAGE + question))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened_pages, "WIDENED_TOKENS", 1000 * PAGE)
        work, _ = PrefillWork.of(chunks, PAGE, None, widens=True)  # type: ignore[arg-type]
    assert work.widened is not None
    pages = np.hstack(work.widened.pages)
    assert len(pages) < 1.3 * len(np.unique(pages))
