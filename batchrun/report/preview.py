"""What `batchrun plan` shows: the partitions, and what a sample of the rows becomes as tokens."""

from __future__ import annotations

from typing import Any

from batchrun.errors import RowFault
from batchrun.job import Job
from batchrun.prepare import Prepared, prepare, rows_of
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
        "output": prepared.folder.name,
        "files": len(plan.files),
        "rows": plan.rows,
        "bytes": sum(sum(file.group_bytes) for file in plan.files),
        "partitions": len(plan.partitions),
        "largest_partition": max(partition.rows for partition in plan.partitions),
        "plan_hash": plan.hash,
        "skipped": [f"{skipped.path} ({skipped.reason})" for skipped in plan.skipped],
        "context": prepared.texts.engine.max_context,
        "prompt_tokens": token_sample(lengths, faults, plan.rows),
    }


def _sample(prepared: Prepared) -> tuple[list[int], list[str]]:
    plan, builder = prepared.plan, prepared.texts.builder
    step = max(1, len(plan.partitions) // SAMPLED_PARTITIONS)
    chosen = plan.partitions[::step][:SAMPLED_PARTITIONS]
    lengths: list[int] = []
    faults: list[str] = []
    for partition in chosen:
        left = SAMPLED_ROWS // len(chosen)
        for records in rows_of(prepared.job, plan, partition, builder.columns):
            for built in builder.build(records.slice(0, left)):
                if isinstance(built, RowFault):
                    faults.append(str(built))
                else:
                    lengths.append(len(built))
            left -= records.num_rows
            if left <= 0:
                break
    return lengths, faults
