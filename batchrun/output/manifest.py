"""The success marker: written once every part of the plan is there with the rows that the plan gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np

from batchrun.errors import OutputError
from batchrun.output import document, part, state
from batchrun.output.attempt import Receipt
from batchrun.output.document import Damaged
from batchrun.output.layout import MANIFEST, Layout
from batchrun.output.part import Summary
from batchrun.storage import Folder, NotFound

# Footers are a request each and little else.
READERS = 16


@dataclass(frozen=True, slots=True)
class Part:
    key: str
    rows: int
    ok: int
    failed: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Totals of the whole output and its parts in the plan's order."""

    plan_hash: str
    job_hash: str
    rows: int
    ok: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    errors: dict[str, int]
    parts: list[Part]

    def describes(self, found: state.State) -> bool:
        """Whether the parts that are there now are, by key and size, the ones it was written for."""
        return not found.foreign and np.array_equal(found.part_bytes, [entry.bytes for entry in self.parts])


def write(
    folder: Folder,
    layout: Layout,
    job_hash: str,
    rows: Sequence[int],
    receipts: Mapping[int, Receipt] = MappingProxyType({}),
) -> Manifest:
    """Checks every part against `rows` (per partition, by the plan) and writes the manifest, once.

    A part is read for it, unless there is a receipt (by partition) and the part is still as long as it says.

    Raises:
        OutputError: a part is missing, damaged, foreign or of another length: names what and where.
    """
    found = state.scan(folder, layout)
    found.refuse_foreign(folder)
    if not found.complete:
        missing = np.flatnonzero(~found.committed)
        first = layout.part(int(missing[0]))
        what = f"{len(missing)} of {layout.partitions} parts are missing, the first is {first}"
        raise OutputError(what, folder.name, "run again to go on from here")
    sizes = found.part_bytes.tolist()

    def summary_of(partition: int) -> Summary:
        receipt = receipts.get(partition)
        if receipt is not None and receipt.bytes == sizes[partition]:
            return receipt.summary
        return part.inspect(folder, layout.part(partition), sizes[partition])

    with ThreadPoolExecutor(READERS) as pool:
        summaries = list(pool.map(summary_of, range(layout.partitions)))
    for i, summary in enumerate(summaries):
        if problem := disagreement(summary, layout, job_hash, i, rows[i]):
            raise part.damaged(folder, layout.part(i), problem)
    manifest = _total(summaries, layout, job_hash, sizes)
    if read(folder) != manifest:
        folder.put(MANIFEST, document.encode(asdict(manifest)))
    return manifest


def read(folder: Folder) -> Manifest | None:
    """The manifest, None where there is none. Raises OutputError where it is damaged."""
    try:
        values = document.decode(folder.read(MANIFEST))
        return Manifest(**{**values, "parts": [Part(**entry) for entry in values["parts"]]})
    except NotFound:
        return None
    except (Damaged, KeyError, TypeError) as error:
        where = folder.where(MANIFEST)
        raise OutputError(f"damaged ({error})", where, "delete it and run again") from error


def disagreement(summary: Summary, layout: Layout, job_hash: str, partition: int, rows: int) -> str | None:
    """What keeps a part from being the plan's, if anything does."""
    if (
        summary.plan_hash != layout.plan_hash
        or summary.job_hash != job_hash
        or summary.partition != partition
    ):
        return "a part of another job, plan or partition"
    if summary.rows != rows:
        return f"{summary.rows} rows where the plan has {rows}"
    return None


def _total(summaries: list[Summary], layout: Layout, job_hash: str, sizes: list[int]) -> Manifest:
    errors: Counter[str] = Counter()
    for summary in summaries:
        errors.update(summary.errors)
    return Manifest(
        plan_hash=layout.plan_hash,
        job_hash=job_hash,
        rows=sum(s.rows for s in summaries),
        ok=sum(s.ok for s in summaries),
        failed=sum(s.failed for s in summaries),
        prompt_tokens=sum(s.prompt_tokens for s in summaries),
        output_tokens=sum(s.output_tokens for s in summaries),
        errors=dict(errors),
        parts=[Part(layout.part(i), s.rows, s.ok, s.failed, sizes[i]) for i, s in enumerate(summaries)],
    )
