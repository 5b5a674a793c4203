"""Whatever the rows are, an engine over two ranks answers like one alone: on a CPU, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tp_models
from adapters import make_adapter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_models import MAX_CONTEXT

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.parallel.ranks import Ranks
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.protocol import EngineSpec, Request, RowSampling, Sampling, Scored
from batchrun.engine.weights.loading import load_model

PAGE = 16
NEVER = 10**6  # a stop token that no model has: the engine then learns how long answers are, and preempts
PREFIXES = [np.random.default_rng(length).integers(3, 259, length) for length in (0, 20, 37)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PagedEngine, PagedEngine]]:
    """One alone, and one over two ranks, of the same model with two adapters."""
    root = tmp_path_factory.mktemp("ranks")
    folder = tp_models.make_model("qwen3", root / "model")
    adapters = tuple(str(make_adapter(root / f"adapter-{seed}", folder, seed=seed)) for seed in (1, 2))
    spec = EngineSpec(
        *("paged", str(folder), str(folder)),
        max_context=MAX_CONTEXT,
        options={"max_rows": 8, "prefill_tokens": 60, "decode_steps": 4, "cache_tokens": 224},
        stop_token_ids=(17, NEVER),
        sampling=Sampling(
            repetition_penalty=1.1, seed=5, logprobs=0, by_row=("temperature", "top_p", "stop")
        ),
        adapters=adapters,
    )
    ranks = Ranks(replace(spec, gpus=2), PAGE)
    try:
        share = load_share(replace(spec, gpus=2), ranks.group)
        yield (
            PagedEngine(spec, load_model(spec), PAGE),
            PagedEngine(replace(spec, gpus=2), share, PAGE, ranks),
        )
    finally:
        ranks.close()


SAMPLINGS = st.builds(
    RowSampling,
    st.sampled_from([0.0, 0.0, 0.8, 1.5]),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from([(), (), ("e", "ab", "0")]),
)


@st.composite
def _rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of which some begin alike, go on behind what was generated before, or are scored."""
    rows = []
    for number in range(draw(st.integers(9, 12))):
        new = draw(st.sampled_from([1, 60, 90, 90]))
        rows.append({
            "id": number,
            "prefix": draw(st.sampled_from([0, 1, 2, 2])),
            "own": draw(st.integers(1, 30)),
            "max_new_tokens": new,
            "begun": draw(st.sampled_from([0, 0, 0, new - 1, new // 2])),
            "row_seed": draw(st.integers(0, 2**63 - 1)),
            "sampling": draw(SAMPLINGS),
            "adapter": draw(st.integers(0, 2)),
            "scored": draw(st.sampled_from([False, False, False, False, True])),
        })  # fmt: skip
    return rows


def _requests(rows: list[dict[str, Any]]) -> Iterator[Request]:
    for row in rows:
        rng = np.random.default_rng(row["own"])
        ids = np.concatenate([PREFIXES[row["prefix"]], rng.integers(3, 259, row["own"])]).astype(np.int32)
        named = {name: row[name] for name in ("row_seed", "sampling", "adapter")}
        if row["scored"]:
            scored = Scored(np.array([7, 8], np.int32), np.array([min(1, len(ids) - 1), 0], np.int32))
            yield Request(row["id"], ids, 1, scored=scored, **named)
        else:
            request = Request(row["id"], ids, row["max_new_tokens"], **named)
            request.generated = rng.integers(20, 259, row["begun"]).astype(np.int32)
            request.values = {"logprobs": np.zeros(row["begun"], np.float32)} if row["begun"] else {}
            yield request


def test_two_ranks_answer_like_one_whatever_the_rows_are(engines: tuple[PagedEngine, PagedEngine]) -> None:
    alone, together = engines

    # Always the same ones: sums in another order may choose another of two tokens that are about as likely.
    @settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(_rows())
    def check(rows: list[dict[str, Any]]) -> None:
        want = {c.id: c for c in alone.generate(_requests(rows))}
        have = {c.id: c for c in together.generate(_requests(rows))}
        assert sorted(have) == sorted(want) == [row["id"] for row in rows]
        for number, one in want.items():
            assert have[number].token_ids.tolist() == one.token_ids.tolist(), number
            assert have[number].finish_reason == one.finish_reason
            assert np.allclose(have[number].values["logprobs"], one.values["logprobs"], atol=1e-3)
        together._scheduler.check()

    check()
    assert alone._scheduler.preemptions
    assert alone.stats.shared_tokens
    assert together.stats.output_tokens == alone.stats.output_tokens > 500
