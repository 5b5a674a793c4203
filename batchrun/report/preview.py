"""What `batchrun plan` shows: the partitions, and what a sample of the rows becomes as tokens."""

from __future__ import annotations

from typing import Any

from batchrun.dataset.reader import read_partition
from batchrun.errors import RowFault
from batchrun.prepare import Prepared, prepare
from batchrun.job import Job
from batchrun.report.summary import token_sample

SAMPLED_PARTITIONS = 10
SAMPLED_ROWS = 1000


def preview(job: Job) -> dict[str, Any]:
    """Plans the job and tokenizes a sample spread over the partitions; writes nothing.

    Returns plain values: files, rows, bytes (uncompressed), partitions, plan_hash, context and the percentiles of
    the sampled prompt lengths in tokens.
    """
    prepared = prepare(job)
    plan = prepared.plan
    lengths, faults = _sample(prepared)
    return {
        "output": prepared.folder.url,
        "files": len(plan.files),
        "rows": plan.rows,
        "bytes": plan.bytes,
        "partitions": len(plan.partitions),
        "largest_partition": max((p.rows for p in plan.partitions), default=0),
        "plan_hash": plan.hash,
        "skipped": list(plan.skipped),
        "context": prepared.context,
        "prompt_tokens": token_sample(lengths, faults, plan.rows),
    }


def _sample(prepared: Prepared) -> tuple[list[int], list[str]]:
    partitions = prepared.plan.partitions
    step = max(1, len(partitions) // SAMPLED_PARTITIONS)
    chosen = partitions[::step][:SAMPLED_PARTITIONS]
    lengths: list[int] = []
    faults: list[str] = []
    for partition in chosen:
        left = SAMPLED_ROWS // len(chosen)
        task = prepared.plan.task(partition.index)
        for batch in read_partition(task, prepared.builder.columns, prepared.job.input, batch_rows=256):
            for built in prepared.builder.build(batch.data.slice(0, left)):
                if isinstance(built, RowFault):
                    faults.append(str(built))
                else:
                    lengths.append(len(built))
            left -= batch.data.num_rows
            if left <= 0:
                break
    return lengths, faults
