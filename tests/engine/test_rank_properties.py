"""Whatever the rows are, an engine over two ranks or four answers like one alone: on a CPU, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tp_models
import warm
from adapters import make_adapter
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


def _rows(adapters: int) -> Rows:
    """Rows of which some begin alike, go on behind what was generated before, are scored, or are given up."""
    rng = np.random.default_rng(4)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    rows = []
    for number in range(12):
        new = one_of(1, 22, 44, 44)
        rows.append({
            "id": number,
            "prefix": one_of(0, 1, 2, 2),
            "own": int(rng.integers(1, 20)),
            "max_new_tokens": new,
            "begun": one_of(0, 0, 0, new - 1, new // 2),
            "row_seed": int(rng.integers(2**63)),
            "sampling": RowSampling(one_of(0.0, 0.0, 0.8, 1.5), one_of(1.0, 0.8), one_of((), (), ("e", "ab", "0"))),
            "adapter": number % (adapters + 1),
            "scored": one_of(False, False, False, False, True),
            "given_up": number % 2 == 0,
        })  # fmt: skip
    return rows


def _requests(rows: Rows) -> Iterator[Request]:
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


def _answers(paged: PagedEngine, rows: Rows, give_up: bool) -> dict[int, Completion]:
    """All rows' answers; those that are given up are so once a few rows are done."""
    requests = list(_requests(rows))
    found: dict[int, Completion] = {}
    for completion in paged.generate(iter(requests)):
        found[completion.id] = completion
        for request, row in zip(requests, rows, strict=True):
            request.cancelled = give_up and len(found) >= 3 and row["given_up"]
    paged._scheduler.check()
    assert sorted(found) == [row["id"] for row in rows]
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


# But for one whose experts are computed like another's.
@pytest.mark.parametrize("name", sorted({*tp_models.CONFIGS} - {"mixtral"}))
def test_two_ranks_and_four_answer_like_one_whatever_the_rows_are(name: str, tmp_path: Path) -> None:
    folder = tp_models.make_model(name, tmp_path / "model")
    seeds = (1, 2) if name == "qwen3" else ()
    adapters = tuple(str(make_adapter(tmp_path / f"adapter-{seed}", folder, seed=seed)) for seed in seeds)
    sampling = Sampling(repetition_penalty=1.1, seed=5, logprobs=0, by_row=("temperature", "top_p", "stop"))
    spec = _spec(folder, adapters=adapters, sampling=sampling)
    # Always the same: sums in another order may choose another of two tokens that are about as likely.
    rows = _rows(len(adapters))
    with _engine(spec) as alone:
        want = _answers(alone, rows, give_up=False)
    assert alone.stats.shared_tokens
    for gpus in (2, 4):
        with _engine(replace(spec, gpus=gpus)) as together:
            have = _answers(together, rows, give_up=True)
        for number, answer in have.items():
            _check_like(want[number], answer)
        assert together._scheduler.preemptions
        assert any(len(answer.token_ids) for answer in have.values() if answer.finish_reason == "cancelled")


@pytest.mark.parametrize(("name", "gpus"), [("llama", 2), ("mistral", 4)])
def test_ranks_choose_the_likeliest_tokens_like_one(name: str, gpus: int, tmp_path: Path) -> None:
    """With embeddings that are the head, too, and with a vocabulary that cannot be divided."""
    spec = _spec(tp_models.make_model(name, tmp_path))
    rows = [row | {"sampling": None} for row in _rows(adapters=0)]
    with _engine(spec) as alone:
        want = _answers(alone, rows, give_up=False)
    with _engine(replace(spec, gpus=gpus)) as together:
        for number, answer in _answers(together, rows, give_up=False).items():
            _check_like(want[number], answer)


def test_what_cannot_be_divided_is_refused_before_any_process_is_started(tmp_path: Path) -> None:
    llama = tp_models.make_model("llama", tmp_path)
    with pytest.raises(Unsupported, match=r"num_attention_heads \(8\) cannot be divided by 3"):
        Ranks(_spec(llama, gpus=3), PAGE)
    with pytest.raises(Unsupported, match="no plan"):
        Ranks(_spec(model_folder("gpt2"), gpus=2), PAGE)
