"""The success marker: written once every part of the plan is there with the rows that the plan gives it.

It is told from the plans, the records of retries and the parts' own footers alone, so that whoever writes it again
after a crash writes the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

import numpy as np

from batchrun.errors import Incomplete, OutputError
from batchrun.output import document, part, retry, state
from batchrun.output.attempt import Receipt
from batchrun.output.document import Damaged
from batchrun.output.layout import MANIFEST, Layout
from batchrun.output.output import Output
from batchrun.output.part import Summary
from batchrun.output.retry import Retry
from batchrun.storage import Folder, NotFound

# Footers are a request each and little else.
READERS = 16

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One part as the manifest lists it: its key, the counts of its own rows, its size in bytes, and the attempt that
    wrote it.

    `digest` is of the part's bytes; empty where a version wrote the part, or the manifest, that had none.
    """

    key: str
    rows: int
    ok: int
    failed: int
    bytes: int
    attempt: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """One of the output's plans: its hash, and what it came to, rows of the output."""

    hash: str
    parts: int
    rows: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """A part that a retry replaced: when, the attempts before and after, its rows run again, and answered by that."""

    key: str
    at: str
    old: str
    new: str
    rows: int
    ok: int


@dataclass(frozen=True, slots=True)
class Retried:
    """A retry: see `Retry`. Not finished means that parts are left for it to fix."""

    number: int
    created: str
    errors: list[str]
    changes: list[str]
    job_hash: str
    finished: bool
    parts: list[Replaced]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Totals of the whole output and its parts in the plans' order.

    Rows are the output's. `input_rows` are the input's where each of these has several, one for each sample; None where
    they are as many. `errors` counts failed rows by code, `examples` shows a few of each; `failed_folder` holds them as
    a dataset. `finish_reasons` and `empty` are as in a part's `Summary`.
    """

    plan_hash: str
    job_hash: str
    rows: int
    ok: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    errors: dict[str, int]
    examples: dict[str, list[str]]
    failed_folder: str | None
    plans: list[Planned]
    retries: list[Retried]
    parts: list[Part]
    finish_reasons: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    input_rows: int | None = None

    def describes(self, found: state.State) -> bool:
        """Whether the parts that are there now are, by key and size, the ones it was written for, and no retry
        has gone on since."""
        return (
            not found.foreign
            and np.array_equal(found.part_bytes, [entry.bytes for entry in self.parts])
            and found.retries == len(self.retries)
            and self.unfinished is None
        )

    @property
    def unfinished(self) -> Retried | None:
        """The last retry where it was cut off; one that another followed was given up for that."""
        last = self.retries[-1:]
        return last[0] if last and not last[0].finished else None


def summaries(
    output: Output, receipts: Mapping[int, Receipt] = MappingProxyType({})
) -> tuple[list[Summary], list[int]]:
    """What every part says of itself, and its bytes, in order.

    A part is read for it, unless there is a receipt (by partition) and the part is still as long as it says.

    Raises:
        Incomplete: a part is missing.
        OutputError: a part is damaged or foreign: names what and where.
    """
    folder, layout = output.folder, output.layout
    found = output.scan()
    found.refuse_foreign(folder)
    if not found.complete:
        missing = np.flatnonzero(~found.committed)
        first = layout.part(int(missing[0]))
        what = f"{len(missing)} of {layout.partitions} parts are missing, the first is {first}"
        raise Incomplete(what, folder.name, "`batchrun run` makes them again")
    sizes = found.part_bytes.tolist()

    def summary_of(partition: int) -> Summary:
        receipt = receipts.get(partition)
        if receipt is not None and receipt.bytes == sizes[partition]:
            return receipt.summary
        return part.inspect(folder, layout.part(partition), sizes[partition])

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(summary_of, range(layout.partitions))), sizes


def write(output: Output, receipts: Mapping[int, Receipt] = MappingProxyType({})) -> Manifest:
    """Checks every part against the plan and writes the manifest, once; `receipts` as for `summaries`.

    Parts are of the pinned job or of a retry's.

    Raises:
        Incomplete: a part is missing.
        OutputError: a part is damaged, foreign or of another length: names what and where.
    """
    folder = output.folder
    found, sizes = summaries(output, receipts)
    retries = retry.read(folder)
    known = job_hashes(output, retries)
    for i, summary in enumerate(found):
        if problem := disagreement(summary, output, known, i):
            raise part.damaged(folder, output.layout.part(i), problem)
    manifest = _total(output, found, sizes, retries)
    if read(folder) != manifest:
        folder.put(MANIFEST, document.encode(asdict(manifest)))
    return manifest


def read(folder: Folder) -> Manifest | None:
    """The manifest, None where there is none. Raises OutputError where it is damaged."""
    try:
        values = document.decode(folder.read(MANIFEST))
        values["parts"] = [Part(**entry) for entry in values["parts"]]
        values["plans"] = [Planned(**entry) for entry in values["plans"]]
        values["retries"] = [
            Retried(**{**entry, "parts": [Replaced(**one) for one in entry["parts"]]})
            for entry in values["retries"]
        ]
        return Manifest(**values)
    except NotFound:
        return None
    except (Damaged, KeyError, TypeError) as error:
        where = folder.where(MANIFEST)
        raise OutputError(f"damaged ({error})", where, "delete it and run again") from error


def current(folder: Folder, scan: Callable[[], state.State]) -> Manifest | None:
    """The manifest where it describes the parts that are there, which are listed only where there is one. Raises as
    `read`."""
    written = read(folder)
    return written if written is not None and written.describes(scan()) else None


def job_hashes(output: Output, retries: Sequence[Retry]) -> set[str]:
    """Of which jobs parts may be: the pinned one and those that retries recorded."""
    return {output.identity.job_hash, *(one.identity.job_hash for one in retries)}


def disagreement(summary: Summary, output: Output, job_hashes: Container[str], partition: int) -> str | None:
    """What keeps a part from being the plan's, if anything does."""
    rows = output.rows[partition] * output.settings.rows_of_row
    mine = summary.plan_hash == output.layout.hash_of(partition) and summary.partition == partition
    if not mine or summary.job_hash not in job_hashes:
        return "a part of another job, plan or partition"
    if summary.rows != rows:
        return f"{summary.rows} rows where the plan has {rows}"
    return None


def _total(output: Output, summaries: list[Summary], sizes: list[int], retries: Sequence[Retry]) -> Manifest:
    layout = output.layout
    errors: Counter[str] = Counter()
    finish_reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for i, summary in enumerate(summaries):
        errors.update(summary.errors)
        finish_reasons.update(summary.finish_reasons)
        for code, example in summary.examples.items():
            shown = examples.setdefault(code, [])
            if len(shown) < EXAMPLES:
                # Parts from before rows had names of their own number them within the part.
                shown.append(f"{layout.part(i)}, {example}" if example.startswith("row ") else example)
    return Manifest(
        plan_hash=layout.plan_hash,
        job_hash=output.identity.job_hash,
        rows=sum(s.rows for s in summaries),
        ok=sum(s.ok for s in summaries),
        failed=sum(s.failed for s in summaries),
        prompt_tokens=sum(s.prompt_tokens for s in summaries),
        output_tokens=sum(s.output_tokens for s in summaries),
        errors=dict(errors),
        examples=examples,
        failed_folder=output.settings.failed,
        plans=_planned(summaries),
        retries=[_retried(one, summaries, layout) for one in retries],
        parts=[
            Part(layout.part(i), s.rows, s.ok, s.failed, sizes[i], s.attempt, s.digest)
            for i, s in enumerate(summaries)
        ],
        finish_reasons=dict(finish_reasons),
        empty=sum(s.empty for s in summaries),
        input_rows=output.plan.rows if output.settings.rows_of_row > 1 else None,
    )


def _planned(summaries: list[Summary]) -> list[Planned]:
    parts = Counter(summary.plan_hash for summary in summaries)
    rows: Counter[str] = Counter()
    for summary in summaries:
        rows[summary.plan_hash] += summary.rows
    return [Planned(plan_hash, count, rows[plan_hash]) for plan_hash, count in parts.items()]


def _retried(one: Retry, summaries: list[Summary], layout: Layout) -> Retried:
    return Retried(
        number=one.number,
        created=one.created,
        errors=one.errors,
        changes=one.changes,
        job_hash=one.identity.job_hash,
        finished=not one.work(summaries),
        parts=[
            Replaced(layout.part(i), past.at, past.old, past.new, past.rows, past.ok)
            for i, summary in enumerate(summaries)
            for past in summary.retries
            if past.generation == one.number
        ],
    )
