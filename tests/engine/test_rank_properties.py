"""Whatever the rows are, an engine over two ranks or four answers like one alone: on a CPU, in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import tp_models
import warm
from adapters import make_adapter
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from tiny_models import MAX_CONTEXT, model_folder

from batchrun.engine.paged import PagedEngine, engine
from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.parallel.ranks import Ranks
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.protocol import Completion, EngineSpec, Request, RowSampling, Sampling, Scored
from batchrun.engine.weights.loading import load_model

PAGE = 16
NEVER = 10**6  # a stop token that no model has: the engine then learns how long answers are, and preempts
PREFIXES = [np.random.default_rng(length).integers(3, 259, length) for length in (0, 20, 37)]

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    warm.fork_engines(monkeypatch)
    # Every look at rows is also one at which of them are given up.
    monkeypatch.setattr(engine, "CANCEL_SECONDS", 0)


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec(
        *("paged", str(folder), str(folder)),
        max_context=MAX_CONTEXT,
        options={"max_rows": 8, "prefill_tokens": 60, "decode_steps": 4, "cache_tokens": 128},
        stop_token_ids=(17, NEVER),
        **changes,
    )


@contextmanager
def _engine(spec: EngineSpec) -> Iterator[PagedEngine]:
    if spec.gpus == 1:
        yield PagedEngine(spec, load_model(spec), page_size=PAGE)
        return
    ranks = Ranks(spec, PAGE)
    try:
        yield PagedEngine(spec, load_share(spec, ranks.group), PAGE, ranks)
    finally:
        ranks.close()


# Three that are admitted together and then need more pages than there are.
PRESSING: Rows = [
    {
        "prefix": 2, "own": own, "max_new_tokens": 30, "begun": 0.0, "row_seed": own, "adapter": 0,
        "sampling": RowSampling(0.0, 1.0, ()), "scored": False, "given_up": False,
    } for own in (2, 3, 4)
]  # fmt: skip


def _some_rows(adapters: int) -> st.SearchStrategy[Rows]:
    """Rows of which some begin alike, go on behind what was generated before, are scored, or are given up."""
    row = st.fixed_dictionaries({
        "prefix": st.sampled_from(range(len(PREFIXES))),
        "own": st.integers(1, 19),
        "max_new_tokens": st.sampled_from([1, 9, 22]),
        # How much of them.
        "begun": st.sampled_from([0.0, 0.5, 1.0]),
        "row_seed": st.integers(0, 2**63 - 1),
        "sampling": st.builds(
            RowSampling,
            st.sampled_from([0.0, 0.8, 1.5]),
            st.sampled_from([1.0, 0.8]),
            st.sampled_from([(), ("e", "ab", "0")]),
        ),
        "adapter": st.integers(0, adapters),
        "scored": st.sampled_from([False, False, False, True]),
        "given_up": st.booleans(),
    })  # fmt: skip
    return st.lists(row, min_size=1, max_size=4).map(lambda rows: PRESSING + rows)


def _requests(rows: Rows) -> Iterator[Request]:
    for number, row in enumerate(rows):
        rng = np.random.default_rng(row["own"])
        ids = np.concatenate([PREFIXES[row["prefix"]], rng.integers(3, 259, row["own"])]).astype(np.int32)
        named = {name: row[name] for name in ("row_seed", "sampling", "adapter")}
        if row["scored"]:
            scored = Scored(np.array([7, 8], np.int32), np.array([min(1, len(ids) - 1), 0], np.int32))
            yield Request(number, ids, 1, scored=scored, **named)
        else:
            request = Request(number, ids, row["max_new_tokens"], **named)
            begun = int(row["begun"] * (row["max_new_tokens"] - 1))
            request.generated = rng.integers(20, 259, begun).astype(np.int32)
            request.values = {"logprobs": np.zeros(begun, np.float32)} if begun else {}
            yield request


def _answers(
    paged: PagedEngine, rows: Rows, late: Collection[int] = (), give_up: bool = False
) -> dict[int, Completion]:
    """All rows' answers; those that are `late` come once the engine has looked for them in vain, and those that are
    given up are so once a few rows are done."""
    requests = list(_requests(rows))
    arrivals = chain(*([None, request] if request.id in late else [request] for request in requests))
    found: dict[int, Completion] = {}
    for completion in paged.generate(arrivals):
        found[completion.id] = completion
        for request, row in zip(requests, rows, strict=True):
            request.cancelled = give_up and len(found) >= 3 and row["given_up"]
    paged._scheduler.check()
    assert sorted(found) == [*range(len(rows))]
    return found


def _check_like(want: Completion, have: Completion) -> None:
    length = len(have.token_ids)
    if length == 0:
        assert have.finish_reason == "cancelled"
        return
    if have.finish_reason != "cancelled":
        assert (length, have.finish_reason) == (len(want.token_ids), want.finish_reason)
    assert have.token_ids.tolist() == want.token_ids[:length].tolist()
    if "logprobs" in want.values:
        assert np.allclose(have.values["logprobs"], want.values["logprobs"][:length], atol=1e-3)


def _check_ranks(name: str, spec: EngineSpec, ranks: dict[int, int]) -> None:
    """Each number of ranks like one, by so many examples. The engines go on from one to the next, and the examples are
    always the same: sums in another order may choose another of two tokens that are about as likely."""
    by_row = bool(spec.sampling.by_row)
    with _engine(spec) as alone:
        for gpus, examples in ranks.items():
            with _engine(replace(spec, gpus=gpus)) as together:

                @seed(crc32(f"{name} {gpus}".encode()))
                @settings(max_examples=examples, database=None, phases=(Phase.generate,))
                @given(rows=_some_rows(len(spec.adapters)), late=st.sets(st.integers(0, 6), max_size=3))
                def check(rows: Rows, late: set[int]) -> None:
                    if not by_row:
                        rows = [row | {"sampling": None} for row in rows]
                    want = _answers(alone, rows)
                    for number, answer in _answers(together, rows, late, give_up=True).items():
                        _check_like(want[number], answer)

                check()
                assert together._scheduler.preemptions
    assert alone.stats.shared_tokens


@pytest.mark.parametrize("name", sorted(tp_models.CONFIGS))
def test_two_ranks_and_four_answer_like_one_whatever_the_rows_are(name: str, tmp_path: Path) -> None:
    folder = tp_models.make_model(name, tmp_path / "model")
    seeds = (1, 2) if name == "qwen3" else ()
    adapters = tuple(str(make_adapter(tmp_path / f"adapter-{seed}", folder, seed=seed)) for seed in seeds)
    sampling = Sampling(repetition_penalty=1.1, seed=5, logprobs=0, by_row=("temperature", "top_p", "stop"))
    _check_ranks(name, _spec(folder, adapters=adapters, sampling=sampling), {2: 3, 4: 2})


@pytest.mark.parametrize(("name", "gpus"), [("llama", 2), ("mistral", 4)])
def test_ranks_choose_the_likeliest_tokens_like_one(name: str, gpus: int, tmp_path: Path) -> None:
    """With embeddings that are the head, too, and with a vocabulary that cannot be divided."""
    _check_ranks(name, _spec(tp_models.make_model(name, tmp_path)), {gpus: 2})


def test_what_cannot_be_divided_is_refused_before_any_process_is_started(tmp_path: Path) -> None:
    llama = tp_models.make_model("llama", tmp_path)
    with pytest.raises(Unsupported, match=r"num_attention_heads \(8\) cannot be divided by 3"):
        Ranks(_spec(llama, gpus=3), PAGE)
    with pytest.raises(Unsupported, match="no plan"):
        Ranks(_spec(model_folder("gpt2"), gpus=2), PAGE)
