"""The GPU kernels against plain attention: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import exact_fp8
from compile_kernels import GPUS, SHAPES

from batchrun.engine.layers.fp8 import quantize_rows
from batchrun.engine.paged.attention import cascade, page_kernels, widened_pages
from batchrun.engine.paged.attention import cascade_kernels as cascade_attention
from batchrun.engine.paged.attention import decode as decode_attention
from batchrun.engine.paged.attention import prefill as prefill_attention
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.cascade import CascadePlan, CascadePlanner
from batchrun.engine.paged.attention.flash import FlashAttention
from batchrun.engine.paged.attention.gathered import GatheredPages
from batchrun.engine.paged.attention.metadata import (
    AttentionMetadata,
    PrefillTurn,
    SharedPrefixes,
)
from batchrun.engine.paged.attention.widened_pages import WidenedPages
from batchrun.engine.paged.device import sampler_kernels as kernels
from batchrun.engine.paged.device.sampler import top_p_threshold
from batchrun.engine.protocol import TokenTables
from batchrun.engine.tokens.answer_mask import AnswerMask

exact_fp8.use()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
CLOSE = {"atol": 2e-2, "rtol": 2e-2} if torch.cuda.is_available() else {"atol": 1e-5, "rtol": 1e-5}
LAYERS = [
    Layer(query_heads=8, kv_heads=2, head_dim=32, scale=0.2),
    Layer(query_heads=4, kv_heads=4, head_dim=24, scale=0.2, window=20),
    Layer(query_heads=7, kv_heads=1, head_dim=16, scale=0.3, window=50),
    Layer(query_heads=40, kv_heads=1, head_dim=16, scale=0.25),
    Layer(query_heads=4, kv_heads=2, head_dim=64, scale=0.15, softcap=3.0),
]


def _pairs(first: list[Any], second: list[Any], either: list[Any]) -> list[tuple[Any, Any, Any]]:
    """Every pair of values that two of the three have: the last ones take turns over the product of the others."""
    return [(a, b, either[(i + j) % 2]) for i, a in enumerate(first) for j, b in enumerate(second)]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


def _int(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


class Pages:
    """Keys and values of twelve pages, in fp8 with scales or not; of the last no number may be read."""

    def __init__(self, layer: Layer, fp8: bool) -> None:
        shape = (12, 64, layer.kv_heads, layer.head_dim)
        self.keys, self.values, self.scales = _random(*shape), _random(*shape), None
        if fp8:
            # By torch: the interpreter would take seconds to write as many tokens.
            both = [quantize_rows(_random(12 + n, *shape[1:])[:12].reshape(-1, shape[-1])) for n in (0, 1)]
            self.keys, self.values = (rows.view(shape) for rows, _ in both)
            self.scales = torch.stack([scale.view(shape[:3]).transpose(1, 2) for _, scale in both])
        self.spoil(torch.arange(11 * 64, 12 * 64, device=DEVICE))

    def spoil(self, slots: torch.Tensor) -> None:
        """Puts what is no number there."""
        for pages in (self.keys, self.values):
            bytes_or_numbers = pages.view(torch.uint8) if self.scales is not None else pages
            bytes_or_numbers.flatten(0, 1)[slots] = 127 if self.scales is not None else float("nan")
        if self.scales is not None:
            self.scales[:, slots // 64, :, slots % 64] = float("nan")

    def copy(self) -> Pages:
        other = copy.copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other.scales = None if self.scales is None else self.scales.clone()
        return other

    def assert_equal(self, other: Pages) -> None:
        """But for the last page, which is nobody's. A quantized number may be a rounding off."""
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            torch.testing.assert_close(own[:11].float(), others[:11].float(), atol=0, rtol=0)
        if self.scales is not None and other.scales is not None:
            torch.testing.assert_close(self.scales[:, :11], other.scales[:, :11], atol=0, rtol=1e-6)


def _own(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values; those are a part of a wider product, as they come out of joined projections."""
    wider = _random(tokens, layer.kv_heads + 3, layer.head_dim)
    return _random(tokens, layer.kv_heads, layer.head_dim), wider[:, : layer.kv_heads]


def _in_turns(
    metadata: AttentionMetadata, widened: WidenedPages, plans: list[CascadePlan | None]
) -> AttentionMetadata:
    """What attention over pages in fp8 is told of a prefill."""
    turns = [
        PrefillTurn(
            spans, None if plan is None else SharedPrefixes.of(plan, _int), torch.from_numpy(own).to(DEVICE)
        )
        for spans, plan, own in zip(widened.spans, plans, widened.pages, strict=True)
    ]
    return replace(metadata, block_tables=_int(widened.block_tables), turns=turns)


@pytest.mark.parametrize(("layer", "chunk", "fp8"), _pairs(LAYERS, [None, 32, 64], [False, True]))
def test_decode_writes_the_new_token_and_is_attention_over_a_rows_own_pages(
    layer: Layer, chunk: int | None, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(decode_attention, "_split_size", lambda rows: chunk)
    pages = Pages(layer, fp8)
    block_tables, seq_lens = _int([[1, 11], [3, 11], [5, 6], [7, 8], [9, 10]]), _int([1, 64, 65, 100, 128])
    slot_mapping = (_int([1, 3, 6, 8, 10]) * 64 + _int([0, 63, 0, 35, 63])).long()
    query, own = _random(5, layer.query_heads, layer.head_dim), _own(layer, 5)
    reference = pages.copy()
    # What was there before the new token is not read.
    pages.spoil(slot_mapping)

    def decode() -> tuple[torch.Tensor, torch.Tensor]:
        return decode_attention.decode(
            query,
            *own,
            pages.keys,
            pages.values,
            slot_mapping,
            block_tables,
            seq_lens,
            None,
            layer,
            pages.scales,
        )

    out, lse = decode()
    metadata = AttentionMetadata(slot_mapping=slot_mapping, block_tables=block_tables, seq_lens=seq_lens)
    expected = GatheredPages().decode(
        query, *own, reference.keys, reference.values, metadata, layer, None, reference.scales
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    pages.assert_equal(reference)
    assert lse.shape == (5, layer.query_heads)
    monkeypatch.undo()
    torch.testing.assert_close(lse, decode()[1], **CLOSE)


@pytest.mark.parametrize(
    ("layer", "kind", "has_sinks"), _pairs(LAYERS, ["paged", "paged in fp8", "unpaged"], [False, True])
)
def test_prefill_is_causal_attention_behind_what_each_row_already_has(
    layer: Layer, kind: str, has_sinks: bool
) -> None:
    paged = kind != "unpaged"
    new, old = [40, 7, 64, 1], [0, 70, 13, 127] if paged else [0, 0, 0, 0]
    seq_lens = _int([a + b for a, b in zip(new, old, strict=True)])
    cu_seqlens_q = _int([0, 40, 47, 111, 112])
    block_tables = _int([[1, 2], [3, 4], [5, 6], [7, 8]])
    query, own = _random(112, layer.query_heads, layer.head_dim), _own(layer, 112)
    pages = Pages(layer, kind == "paged in fp8")
    sinks = _random(layer.query_heads) * 3 if has_sinks else None
    slot_mapping = torch.cat([
        block_tables[row].long().repeat_interleave(64)[b : b + n] * 64 + torch.arange(b, b + n, device=DEVICE) % 64
        for row, (n, b) in enumerate(zip(new, old, strict=True))
    ])  # fmt: skip
    reference = pages.copy()
    metadata = AttentionMetadata(
        slot_mapping=slot_mapping, block_tables=block_tables, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q
    )
    # As if the first two were of another length, and computed apart.
    spans = [(0, 2, 40), (2, 4, 64)]
    told = replace(metadata, turns=[PrefillTurn(spans)], no_context=not paged)
    if pages.scales is not None:
        plan = WidenedPages.of(spans, block_tables.cpu().numpy(), new, seq_lens.cpu().numpy(), page_size=64)
        told = _in_turns(told, plan, [None] * len(plan.pages))
    out = FlashAttention().prefill(query, *own, pages.keys, pages.values, told, layer, sinks, pages.scales)
    expected = GatheredPages().prefill(
        query, *own, reference.keys, reference.values, metadata, layer, sinks, reference.scales
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    pages.assert_equal(reference)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1]], ids=["copied by the GPU", "by threads"])
def test_a_row_of_no_numbers_spoils_no_other_of_its_prefill(layer: Layer) -> None:
    query, (keys, values) = _random(60, layer.query_heads, layer.head_dim), _own(layer, 60)
    bounds = _int([0, 17, 40, 60]), _int([17, 23, 20])
    expected = prefill_attention.prefill(query, keys, values, None, *bounds, 23, layer)
    keys[17:40] = values[17:40] = float("nan")
    out = prefill_attention.prefill(query, keys, values, None, *bounds, 23, layer)
    assert out[17:40].isnan().all()
    for others in (slice(17), slice(40, 60)):
        torch.testing.assert_close(out[others], expected[others], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("layer", "has_sinks", "turns"),
    [(LAYERS[0], True, 0), (LAYERS[-1], False, 0), (LAYERS[0], True, 1), (LAYERS[-1], False, 2)],
)
def test_prefills_that_read_pages_together_give_attention_over_all_keys(
    layer: Layer, has_sinks: bool, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, of two pages and of one, and a sequence in neither, whose numbers are as if there were none. Pages in
    fp8 are brought back in one turn or in two, each of which has groups of its own."""
    for name, value in {"ROW_COST": 0, "GROUP_COST": 0, "PREFILL_COST": 1}.items():
        monkeypatch.setattr(cascade, name, value)
    lens, older = np.array([9, 7, 3, 9, 1, 4]), np.array([150, 130, 70, 64, 128, 0])
    tables = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 0], [5, 7, 0], [1, 2, 8], [0, 0, 0]], np.int32)
    planner = CascadePlanner(layer, cascade_attention.query_blocks(layer), 2)
    bounds = [(0, 3), (3, 6)] if turns == 2 else [(0, 6)]
    plans = [planner.plan_prefill(tables, lens, older + lens, 64, *bound) for bound in bounds]
    starts = [[] if plan is None else plan.starts.tolist() for plan in plans]
    assert starts == ([[128, 128, 0, 0, 0, 0], []] if turns == 2 else [[128, 128, 64, 64, 128, 0]])
    pages = Pages(layer, fp8=bool(turns))
    reference, alone = pages.copy(), pages.copy()
    query, own = _random(33, layer.query_heads, layer.head_dim), _own(layer, 33)
    sinks = _random(layer.query_heads) * 3 if has_sinks else None
    positions = np.concatenate([np.arange(a, a + b) for a, b in zip(older, lens, strict=True)])
    rows = np.repeat(np.arange(6), lens)
    metadata = AttentionMetadata(
        slot_mapping=_int(tables[rows, positions // 64] * 64 + positions % 64).long(),
        block_tables=_int(tables),
        seq_lens=_int(older + lens),
        cu_seqlens_q=_int(np.concatenate([[0], np.cumsum(lens)])),
    )
    spans = [(0, 2, 9), (2, 6, 9)]
    if turns:
        # Eight pages and the null page, all at once or no more than seven.
        monkeypatch.setattr(widened_pages, "WIDENED_TOKENS", (9 if turns == 1 else 7) * 64)
        widened = WidenedPages.of(spans, tables, lens.tolist(), older + lens, 64)
        assert [(own[0][0], own[-1][1]) for own in widened.spans] == bounds
        shared, each = (_in_turns(metadata, widened, each) for each in (plans, [None] * turns))
    else:
        (plan,) = plans
        assert plan is not None
        shared = replace(metadata, turns=[PrefillTurn(spans, SharedPrefixes.of(plan, _int))])
        each = replace(metadata, turns=[PrefillTurn(spans)])
    out, by_itself = (
        FlashAttention().prefill(query, *own, kept.keys, kept.values, told, layer, sinks, kept.scales)
        for kept, told in ((pages, shared), (alone, each))
    )
    expected = GatheredPages().prefill(
        query, *own, reference.keys, reference.values, metadata, layer, sinks, reference.scales
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    assert torch.equal(out[29:], by_itself[29:])


def test_a_copied_page_is_the_same_up_to_its_copied_tokens_in_every_plane() -> None:
    memory = _random(6, 9, 16, 24)
    before = memory.clone()
    copies = [(1, 2, 5), (1, 3, 15), (4, 8, 1)]
    page_kernels.copy_pages(memory, *(_int(list(column)).long() for column in zip(*copies, strict=True)))
    for source, target, tokens in copies:
        before[:, target, :tokens] = before[:, source, :tokens]
    assert torch.equal(memory, before)


@pytest.mark.parametrize(
    ("layer", "split", "fp8"),
    _pairs([layer for layer in LAYERS if layer.window is None], [None, 32], [False, True]),
)
def test_what_groups_read_together_and_rows_by_themselves_joins_to_attention_over_all_their_keys(
    layer: Layer, split: int | None, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, of 80 and 48 leading tokens, in pieces, and a row in neither; the first page of a group is that of
    its leader alone, the others hold copies."""
    if split is not None:
        monkeypatch.setattr(decode_attention, "_split_size", lambda rows: split)
    twelve = Pages(layer, fp8)
    keys, values, scales = twelve.keys, twelve.values, twelve.scales
    block_tables = _int([[1, 2], [3, 4], [5, 11], [6, 7], [8, 9], [1, 10]])
    for source, target, tokens in ((1, 3, 64), (2, 4, 16), (5, 6, 48), (2, 10, 16)):
        for pages in (keys, values):
            pages = pages.view(torch.uint8) if fp8 else pages
            pages[target, :tokens] = pages[source, :tokens]
        if scales is not None:
            scales[:, target, :, :tokens] = scales[:, source, :, :tokens]
    seq_lens = _int([90, 128, 49, 100, 70, 81])
    slot_mapping = (_int([2, 4, 5, 7, 9, 10]) * 64 + _int([25, 63, 48, 35, 5, 16])).long()
    query, own = _random(6, layer.query_heads, layer.head_dim), _own(layer, 6)
    reference = twelve.copy()
    starts = _int([80, 80, 48, 48, 0, 80])
    members = [[0, 0, 3, 2], [5, 1, 3, 2], [1, 2, 3, 2], [2, 6, 2, 1], [3, 7, 2, 1], [0, 0, 0, 0]]
    # Blocks of two members, as if no more fitted.
    items = [
        [0, 2, 0, 0, 48, 0], [2, 1, 0, 0, 48, 2], [0, 2, 0, 48, 80, 3], [2, 1, 0, 48, 80, 5], [3, 2, 2, 0, 48, 6],
        [0, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    # Of at least the two sequences that each item has.
    few_heads = layer.query_heads // layer.kv_heads <= 32
    queries = cascade_attention.query_blocks(layer)[0 if few_heads and split else 1]
    out, lse = decode_attention.decode(
        query, *own, keys, values, slot_mapping, block_tables, seq_lens, starts, layer, scales
    )
    shared = SharedPrefixes(starts, _int(members), _int(items), queries, 8)
    cascade_attention.merge_prefixes(query, keys, values, block_tables, shared, layer, out, lse, scales)
    metadata = AttentionMetadata(slot_mapping=slot_mapping, block_tables=block_tables, seq_lens=seq_lens)
    expected = GatheredPages().decode(
        query, *own, reference.keys, reference.values, metadata, layer, None, reference.scales
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    whole = decode_attention.decode(
        query, *own, keys, values, slot_mapping, block_tables, seq_lens, None, layer, scales
    )[1]
    torch.testing.assert_close(lse, whole, **CLOSE)


def test_the_top_p_bisection_keeps_what_sorting_keeps() -> None:
    probabilities = torch.rand(5, 900, generator=torch.Generator().manual_seed(0)).pow(8)
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        sorted_kept = probabilities >= top_p_threshold(probabilities, top_p)
        kept = probabilities.to(DEVICE) >= kernels.top_p_threshold(probabilities.to(DEVICE), top_p)
        assert (kept.cpu() == sorted_kept).all()


@pytest.mark.parametrize("vocabulary", [70, 8200])
def test_the_likeliest_allowed_token_is_the_first_of_equals(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    following = rng.integers(1, 40, (40, 6)) * (rng.random((40, 6)) < 0.5)
    following[0] = 0
    tables = TokenTables(rng.integers(0, 6, vocabulary).astype(np.int32), following.astype(np.int16), 3, "")
    mask = AnswerMask(tables, vocabulary, DEVICE)
    states = _int([0, *rng.integers(0, 40, 59)])
    # Of few different values, and a part of a wider product.
    logits = (_random(60, vocabulary + 3) * 2).round()[:, :vocabulary]
    logits[3, 5], logits[4, 6], logits[5] = float("nan"), float("inf"), float("-inf")
    found = kernels.likeliest_allowed(logits, states, mask, -2).tolist()
    masked, allowed = mask.apply(logits, states), mask.allowed(states)
    assert not allowed[0].any()
    for row, token in enumerate(found):
        broken = row in (3, 4, 5) or not allowed[row].any()
        equal = (masked[row] == masked[row].amax()).nonzero()[:, 0].tolist()
        assert token == (-2 if broken else equal[0])


@pytest.mark.timeout(600)
def test_kernels_compile_for_gpus_and_fits_their_shared_memory() -> None:
    """Without a GPU: the interpreter runs what no compiler would take."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(root / "tests/support/compile_kernels.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["gpu"], one["model"]) for one in told} == set(product(GPUS, [*SHAPES, "any"]))
    attention = {
        "_decode",
        "_combine",
        "_prefill",
        "_prefill_long",
        "_write_quantized",
        "_widen",
        "_attend_prefixes",
        "_merge_prefixes",
        "_likeliest_allowed",
    }
    experts = {
        "_route",
        "_count",
        "_scan",
        "_place",
        "_quantize",
        "_grouped_product",
        "_persistent_product",
    }
    assert {one["kernel"] for one in told} == attention | experts
    only_newer = {"_write_quantized", "_widen", "_quantize", "_persistent_product", "_prefill_long"}
    assert {one["kernel"] for one in told if one["gpu"] == 80} == (attention | experts) - only_newer
    for one in told:
        assert one["shared"] <= GPUS[one["gpu"]], one
