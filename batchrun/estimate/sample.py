"""A few of a plan's rows, spread over all of it, as the prompts that a run would send."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.dataset.plan import Partition, Plan, Slice
from batchrun.dataset.rows import read_rows
from batchrun.dataset.source import concurrently
from batchrun.driver.prepare import Prepared
from batchrun.engine.protocol import TokenIds
from batchrun.errors import FaultCode, RowFault
from batchrun.prompt.codec import open_codec
from batchrun.prompt.tokens import Prompt, PromptBuilder

# Rows sampled by default: shares are known to about two points, and a plan takes seconds.
ROWS = 2000
# Places that a sample is taken from, each a few consecutive rows: a page is decoded for its rows alone.
RUNS = 100
SHOWN_PROMPTS = 5
# Of a 95% interval.
Z = 1.96


@dataclass
class Sample:
    """Sampled rows, every one of which stands for as many rows of the plan as any other.

    `built`, `new_tokens` (at most) and `runs` (which of the places it is from, the unit that a bootstrap draws) are of
    the rows that have a prompt, `faults` of those that have none. `too_long` counts rows that fail or are cut for their
    length, `texts` are a few rendered prompts. `complete` tells whether these are all rows of the plan.
    """

    built: list[Prompt] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)
    too_long: int = 0
    texts: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def prompts(self) -> list[TokenIds]:
        """The prompts' tokens."""
        return [prompt.token_ids for prompt in self.built]

    @property
    def rows(self) -> int:
        """Sampled rows, those without a prompt included."""
        return len(self.built) + len(self.faults)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(prompts,) tokens of each prompt."""
        return np.array([len(prompt) for prompt in self.prompts], np.int64)

    @property
    def duplicates(self) -> int:
        """Prompts that are the same, token by token and for the same adapter, as an earlier one of the sample."""
        return len(self.built) - len({(one.adapter, one.token_ids.tobytes()) for one in self.built})

    @property
    def shared_prefix(self) -> float:
        """The share of prompt tokens that only repeat how another sampled prompt begins."""
        ordered = sorted((prompt.adapter, prompt.token_ids.tolist()) for prompt in self.built)
        shared = sum(_common(a, b) for (mine, a), (its, b) in pairwise(ordered) if mine == its)
        return shared / max(1, sum(len(tokens) for _, tokens in ordered))

    def examples(self) -> dict[str, tuple[int, str]]:
        """By error code: how many sampled rows have it, and one message."""
        counts = Counter(str(fault.code) for fault in self.faults)
        messages = {str(fault.code): fault.message for fault in reversed(self.faults)}
        return {code: (count, messages[code]) for code, count in counts.most_common()}


def sample(prepared: Prepared, rows: int = ROWS, seconds: float = math.inf) -> Sample:
    """Takes `rows` rows out of the plan, or all where there are no more, and makes prompts of them.

    The plan's slices are put in order of their bytes per row and then of their files, and places at equal distances
    are read from them: short and long rows, and all files, come in with the share that they have (systematic
    sampling of an ordered frame: Cochran, Sampling Techniques, chapter 8). Reading stops after `seconds`.
    """
    plan, started = prepared.plan, time.monotonic()
    limit = prepared.job.generation.defaults.max_new_tokens
    cut = prepared.job.prompt.truncate is not None
    strict = _without_cutting(prepared) if cut else prepared.codec.builder
    found = Sample(complete=plan.rows <= rows)
    places = _places(plan, rows)
    show_every = max(1, min(rows, plan.rows) // SHOWN_PROMPTS)
    remote = any("://" in file.path for file in plan.files)
    for pieces in concurrently(lambda place: list(_read(prepared, *place)), places, remote):
        for run, records, fault in pieces:
            if fault is not None:
                found.faults += [fault] * records.num_rows
                continue
            built = strict.prompts(records)
            long = [_is_too_long(prompt) for prompt in built]
            found.too_long += sum(long)
            if cut and any(long):
                built = prepared.codec.builder.prompts(records)
            for i, prompt in enumerate(built):
                if found.rows % show_every == 0 and len(found.texts) < SHOWN_PROMPTS:
                    found.texts += [str(t) for t in prepared.codec.builder.render(records.slice(i, 1))]
                if isinstance(prompt, RowFault):
                    found.faults.append(prompt)
                else:
                    found.built.append(prompt)
                    found.new_tokens.append(prompt.settings.max_new_tokens if prompt.settings else limit)
                    found.runs.append(run)
        if time.monotonic() - started > seconds:
            found.complete = False
            break
    return found


def interval(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share that was seen `count` times in `total` (Wilson 1927), as two shares."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = count / total, Z * Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def spread(count: int) -> list[int]:
    """0 to count - 1 so that any number of the first ones lie evenly among all (van der Corput 1935)."""
    bits = max(1, (count - 1).bit_length())
    mirrored = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in mirrored if i < count]


def _without_cutting(prepared: Prepared) -> PromptBuilder:
    prompt = prepared.job.prompt.model_copy(update={"truncate": None})
    job = prepared.job.model_copy(update={"prompt": prompt})
    return open_codec(job, prepared.model, prepared.plan.schema).builder


def _is_too_long(prompt: Prompt | RowFault) -> bool:
    return isinstance(prompt, RowFault) and prompt.code == FaultCode.PROMPT_TOO_LONG


def _places(plan: Plan, rows: int) -> list[tuple[Slice, list[tuple[int, int, int]]]]:
    """Slices to read, in an order that covers the plan early, each with (run, first row, last row) inside it."""
    slices = [part for part in plan.in_input_order() if part.rows]
    slices.sort(key=lambda part: (_bytes_per_row(plan, part), part))
    ends = np.cumsum([part.rows for part in slices]) if slices else np.zeros(0, np.int64)
    length = max(1, min(rows, plan.rows) // RUNS)
    wanted: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    if plan.rows <= rows:
        runs = count()
        for i, part in enumerate(slices):
            for first in range(0, part.rows, length):
                wanted[i].append((next(runs), first, min(first + length, part.rows)))
    else:
        for run in range(rows // length):
            start = int((run + 0.5) / (rows // length) * plan.rows - length / 2)
            end = start + length
            i = int(np.searchsorted(ends, start, side="right"))
            # A short slice's run goes on in the next one.
            while start < end and i < len(slices):
                before = int(ends[i]) - slices[i].rows
                wanted[i].append((run, start - before, min(end, int(ends[i])) - before))
                start, i = int(ends[i]), i + 1
    order = sorted(wanted)
    return [(slices[order[i]], wanted[order[i]]) for i in spread(len(order))]


def _bytes_per_row(plan: Plan, part: Slice) -> float:
    file = plan.files[part.file]
    return file.group_bytes[part.row_group] / max(1, file.group_rows[part.row_group])


def _read(
    prepared: Prepared, part: Slice, wanted: list[tuple[int, int, int]]
) -> Iterator[tuple[int, pa.RecordBatch, RowFault | None]]:
    """What is wanted of a slice, with its run, and the fault of rows that cannot be read."""
    columns, plan = prepared.codec.builder.columns, prepared.plan
    alone = Partition(0, (part,), part.rows)
    seen = 0
    for batch in read_rows(prepared.job, plan.schema, alone, plan.files_of(alone), columns):
        records = batch.records
        for run, first, end in wanted:
            low, high = max(first - seen, 0), min(end - seen, records.num_rows)
            if low < high:
                yield run, records.slice(low, high - low), batch.fault
        seen += records.num_rows
        if seen >= wanted[-1][2]:
            return


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
