"""What an output has cost: the GPUs' time by what their workers did, and what that comes to per row and token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchrun.telemetry import record
from batchrun.telemetry.record import RunRecord

# What a worker does, to whoever pays for its GPU.
PAID_AS = {"starting": "loading", "loading": "loading", "compiling": "loading", "generating": "generating"}
LINES = ("loading", "generating", "idle")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the bill: GPU seconds, their share of all; money in all, per 1,000 rows and per million tokens
    (prompt and output) that were generated, None without a price or without rows."""

    name: str
    seconds: float
    share: float
    cost: float | None
    per_thousand_rows: float | None
    per_million_tokens: float | None


def lines(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """Loading (starting and compiling included), generating, idle, and all of them; nothing where no time was spent."""
    seconds: dict[str, float] = defaultdict(float)
    money: dict[str, float] = defaultdict(float)
    for run in runs:
        for doing, of_workers in run.worker_time.items():
            spent = run.gpus_per_worker * of_workers
            seconds[PAID_AS.get(doing, "idle")] += spent
            money[PAID_AS.get(doing, "idle")] += spent * (run.price_per_gpu_hour or 0.0) / 3600
    whole = sum(seconds.values())
    if not whole:
        return
    priced = any(run.price_per_gpu_hour is not None for run in runs)
    counts = record.total(runs)
    for name in (*LINES, "in all"):
        spent = whole if name == "in all" else seconds[name]
        cost = sum(money.values()) if name == "in all" else money[name]
        yield Line(
            name=name,
            seconds=spent,
            share=spent / whole,
            cost=cost if priced else None,
            per_thousand_rows=cost / counts.rows * 1e3 if priced and counts.rows else None,
            per_million_tokens=cost / counts.tokens * 1e6 if priced and counts.tokens else None,
        )
