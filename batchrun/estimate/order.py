"""What another order would save: of the rows (`input.order`), or of the fields in a prompt.

Told from sketches of rows that follow each other in the middle of the input, as many as can be read in the time: how
much of a prompt repeats another one is a matter of all the rows around it, and no sample of single rows shows that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchrun.dataset.order import BLOCK_PARTITIONS, ENDS, KEYS, Sketches, sketch
from batchrun.dataset.plan import Plan, Slice
from batchrun.driver.prepare import Prepared
from batchrun.job.job import Job
from batchrun.prompt.template import leading_columns, literal_text, plain_fields
from batchrun.units import size

SECONDS = 2.0
# Partitions' worth of rows that each order of the fields is tried on.
FIELD_PARTITIONS = 4
# Shares of the prompt tokens below which nothing is said.
WORTH = 0.05
# Readings of the input that an order that saves nothing is warned about for.
MANY_READINGS = 2.0
# Bytes of row groups that a worker reads for one partition, more of which are warned about.
MUCH_READING = 2 << 30


@dataclass(frozen=True, slots=True)
class Move:
    """A field of the template before another one, and the share of the computed prompt tokens that this saves."""

    field: str
    before: str
    saved: float


@dataclass(frozen=True, slots=True)
class Orders:
    """`prefix_saved` is the share of prompt tokens that `input.order: prefix` saves of those computed without it,
    `readings` how often it reads the input's bytes (at most, where the plan is not in that order), `partition_bytes`
    what it reads for a partition. `move` is that of the template's fields that saves most. `rows` were looked at.
    """

    rows: int
    is_ordered: bool
    prefix_saved: float
    readings: float
    partition_bytes: float
    move: Move | None

    def lines(self) -> list[str]:
        """What is worth being told to a person."""
        shown = []
        reading = "once" if self.readings < 1.05 else f"{self.readings:,.3g} times"
        worth = self.prefix_saved >= WORTH
        if self.is_ordered and worth:
            shown.append(f"input.order: prefix saves about {self.prefix_saved:.0%} of the prompt tokens that rows as "
                         f"they stand would cost, and reads the input {reading}")  # fmt: skip
        elif self.is_ordered and self.readings >= MANY_READINGS:
            fix = ": leave it out" if self.move is None else " with the fields in their order"
            shown.append(f"warning: input.order: prefix saves hardly any prompt tokens here (about "
                         f"{self.prefix_saved:.0%}) and reads the input {reading}{fix}")  # fmt: skip
        elif worth:
            shown.append(f"input.order: prefix would save about {self.prefix_saved:.0%} of the prompt tokens that are "
                         f"computed now, and read the input up to {reading}")  # fmt: skip
        if (self.is_ordered or worth) and self.partition_bytes > MUCH_READING:
            shown.append(f"warning: with input.order: prefix a worker reads {size(self.partition_bytes)} "
                         "for each partition: lower output.rows_per_part or bytes_per_part")  # fmt: skip
        if self.move is not None:
            shown.append(f"put {{{{ {self.move.field} }}}} before {{{{ {self.move.before} }}}}: about "
                         f"{self.move.saved:.0%} fewer prompt tokens to compute")  # fmt: skip
        return shown

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        move = self.move and {
            "field": self.move.field,
            "before": self.move.before,
            "saved": round(self.move.saved, 4),
        }
        return {
            "rows": self.rows,
            "prefix": self.is_ordered,
            "prefix_saved": round(self.prefix_saved, 4),
            "readings": round(self.readings, 1),
            "partition_bytes": round(self.partition_bytes),
            "move": move,
            "lines": self.lines(),
        }


def orders(prepared: Prepared, seconds: float = SECONDS) -> Orders | None:
    """Looks at as many rows as can be read in these seconds, at least those of one slice.

    None where it is all the same: without rows, and where no engine that shares beginnings runs the model.
    """
    job, plan = prepared.job, prepared.plan
    config = json.loads((Path(prepared.model.path) / "config.json").read_bytes())
    shares = job.engine.kind in ("auto", "paged") and not config.get("is_encoder_decoder")
    if not shares or not plan.rows:
        return None
    columns, rows_per_part = leading_columns(job.prompt), job.output.rows_per_part
    started, found, partition = time.monotonic(), [], []
    for number, part in _middle(plan, rows_per_part):
        found.append(sketch([part], plan.files, plan.schema, columns, job.input))
        partition.append(np.full(len(found[-1].keys), number))
        if time.monotonic() - started > seconds:
            break
    sketches, numbers = Sketches.joined(found), np.concatenate(partition)
    rows = len(numbers)
    if _are_copied(job):
        different = _first_of_their_kind(sketches)
        sketches, numbers = sketches.take(different), numbers[different]
    literal = len(literal_text(job.prompt))
    fields = list(range(len(columns)))
    now = _computed(sketches, fields, literal, numbers)
    together = _computed(sketches, fields, literal, np.zeros_like(numbers))
    size = max(1, sum(sum(file.group_bytes) for file in plan.files))
    ordered = job.input.order is not None
    readings = plan.bytes_read / size if ordered else float(min(BLOCK_PARTITIONS, len(plan.partitions)))
    return Orders(
        rows=rows,
        is_ordered=ordered,
        prefix_saved=1 - together / max(1, now),
        readings=readings,
        partition_bytes=readings * size / len(plan.partitions),
        move=_best_move(
            sketches.take(slice(FIELD_PARTITIONS * rows_per_part)),
            [columns.index(name) for name in plain_fields(job.prompt)],
            columns,
            literal,
            np.zeros_like(numbers) if ordered else numbers,
        ),
    )


def _middle(plan: Plan, rows_per_part: int) -> Iterator[tuple[int, Slice]]:
    """Slices that follow each other in the middle of the input, of as many rows as are put in order together, with the
    number of the partition that each is in where rows are as they stand."""
    block = BLOCK_PARTITIONS * rows_per_part
    first, before = (plan.rows - block) // 2, 0
    for number, part in _as_they_stand(plan, rows_per_part):
        if first < before + part.rows and before < first + block:
            yield number, part
        before += part.rows


def _as_they_stand(plan: Plan, rows_per_part: int) -> Iterator[tuple[int, Slice]]:
    if not any(partition.order for partition in plan.partitions):
        for partition in plan.partitions:
            yield from ((partition.index, part) for part in partition.slices)
        return
    before = 0
    for whole in plan.in_input_order():
        for part in _cut(whole, rows_per_part):
            yield before // rows_per_part, part
            before += part.rows


def _cut(part: Slice, rows: int) -> Iterator[Slice]:
    """The slice in pieces of so many rows, where that can be told."""
    if part.rows < part.num_rows or part.rows <= rows:
        yield part
        return
    for first in range(0, part.rows, rows):
        count = min(rows, part.rows - first)
        yield part._replace(first_row=part.first_row + first, num_rows=count, rows=count)


def _are_copied(job: Job) -> bool:
    """Whether a worker copies the answers of rows with the same prompt, whatever their partition."""
    generation = job.generation
    copied = generation.deduplicate or (generation.deduplicate is None and generation.temperature == 0)
    return bool(copied) and generation.samples == 1


def _first_of_their_kind(sketches: Sketches) -> NDArray[np.int64]:
    """The rows that no earlier one equals."""
    order = sketches.sorted()
    keys = sketches.keys[order]
    return np.sort(order[np.r_[True, (keys[1:] != keys[:-1]).any(1)]])


def _computed(sketches: Sketches, fields: Sequence[int], literal: int, groups: NDArray[np.int64]) -> float:
    """Bytes of prompts with these fields, in this order, that do not repeat how another prompt of their group begins.
    `literal` bytes of the template are taken to stand behind the fields."""
    keys = np.concatenate([sketches.keys[:, i * KEYS : (i + 1) * KEYS] for i in fields], 1)
    lengths = sketches.lengths[:, fields]
    order = np.lexsort((*keys.T[::-1], groups))
    keys, lengths, groups = keys[order], lengths[order], groups[order]
    whole = lengths.sum(1) + literal
    different = keys[1:] != keys[:-1]
    first = np.where(different.any(1), different.argmax(1), keys.shape[1])
    field, level = first // KEYS, first % KEYS
    rows = np.arange(len(first))
    before = np.concatenate([np.zeros((len(lengths), 1), np.int64), lengths.cumsum(1)], 1)[1:][rows, field]
    # Values part somewhere between the end that they share and the next one.
    limits = np.array([0, *ENDS, ENDS[-1]])
    ends = (limits[level] + limits[level + 1]) // 2 * (level > 0)
    shorter = np.minimum(lengths[1:], lengths[:-1])[rows, np.minimum(field, len(fields) - 1)]
    inside = np.minimum(ends, shorter)
    alike = field == len(fields)
    shared = np.where(alike, whole[1:], before + inside)
    return float(whole.sum() - shared[groups[1:] == groups[:-1]].sum())


def _best_move(
    sketches: Sketches, fields: Sequence[int], columns: Sequence[str], literal: int, groups: NDArray[np.int64]
) -> Move | None:
    """The field that saves most before one that stands in front of it, if that is worth it."""
    groups = groups[: len(sketches.keys)]
    now = max(1.0, _computed(sketches, fields, literal, groups)) if fields else 1.0
    best = Move("", "", WORTH)
    for i, k in combinations(range(len(fields)), 2):
        moved = [*fields[:i], fields[k], *fields[i:k], *fields[k + 1 :]]
        saved = 1 - _computed(sketches, moved, literal, groups) / now
        if saved > best.saved:
            best = Move(columns[fields[k]], columns[fields[i]], saved)
    return best if best.field else None
