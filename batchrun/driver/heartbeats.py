"""What the workers say of themselves with every heartbeat, added up to what the run looks like now."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.gpu import Gpu
from batchrun.telemetry.progress import WorkerView
from batchrun.worker.generation import AttemptCounters


@dataclass
class Heartbeats:
    """`total` adds the attempts in flight to the finished ones, `covered` is how many rows those in flight have done.

    `activity` names for each of them its worker, its counters, and what changes as long as anything there goes on.
    """

    total: Counters
    covered: int = 0
    worker_views: list[WorkerView] = field(default_factory=list)
    engines: list[tuple[str, EngineStats]] = field(default_factory=list)
    activity: list[tuple[str, AttemptCounters, Hashable]] = field(default_factory=list)


def read(
    workers: Mapping[str, Any], run: str, finished: Counters, in_flight: Mapping[int, int]
) -> Heartbeats:
    """Reads the scheduler's view of its workers, by address, for the run and the rows of its partitions in flight."""
    beats = Heartbeats(finished)
    for address, worker in workers.items():
        snapshot = worker["metrics"].get("batchrun") or {
            "tasks": [],
            "engines": [],
            "loading": 0,
            "rendered": 0,
            "gpu": None,
        }
        engines = [EngineStats(**values) for values in snapshot["engines"]]
        beats.engines += [(address, stats) for stats in engines]
        attempts = [AttemptCounters(**values) for values in snapshot["tasks"]]
        mine = [one for one in attempts if one.run == run and one.partition in in_flight]
        # An engine at work on another attempt's rows is a sign of life, and so is one that loads, or a template.
        alive = (snapshot["loading"], snapshot["rendered"], *map(_activity, engines))
        for one in mine:
            beats.covered += one.reused + one.rows
            beats.total += one
            beats.activity.append((address, one, (one.activity, one.requests, alive)))
        beats.worker_views.append(
            WorkerView(
                address=address,
                host=worker["host"],
                tasks=len(mine),
                slots=worker["nthreads"],
                memory=worker["metrics"].get("memory", 0),
                doing=_doing(mine, engines),
                engine=next((stats for stats in engines if stats.pid), None),
                gpu=Gpu(**snapshot["gpu"]) if snapshot["gpu"] else None,
                rows=sum((one.taken_over or in_flight[one.partition]) - one.handed_over for one in mine),
                counts=sum(mine, Counters()),
            )
        )
    return beats


def _doing(attempts: Sequence[AttemptCounters], engines: Sequence[EngineStats]) -> str:
    """What a worker does, see `WorkerView`; of what two attempts do the one that uses the GPU."""
    if not engines:
        return "starting"
    doing = {one.doing for one in attempts}
    if "generating" in doing:
        return next((stats.stage for stats in engines if not stats.pid), "generating")
    return "sealing" if "sealing" in doing else "idle"


def _activity(stats: EngineStats) -> Hashable:
    tokens = (stats.output_tokens, stats.computed_tokens)
    return (stats.pid, stats.requests, stats.completions, stats.batches, stats.steps, *tokens)
