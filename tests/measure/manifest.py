"""What a plan and a manifest of many parts cost: CPU seconds and bytes.

python -m tests.measure.manifest [1000 10000 100000]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MODEL = Path("jobs/quickstart/model").resolve()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="batchrun-manifest-") as folder:
        for parts in map(int, sys.argv[1:] or ["1000", "10000", "100000"]):
            print(f"{parts:,} parts: {json.dumps(measure(Path(folder), parts))}", flush=True)


def measure(folder: Path, parts: int) -> dict[str, float]:
    """CPU seconds at the end of a run of so many parts, stood in for by files of a byte: their listing, the manifest
    from the run's receipts, and its bytes. Beforehand, the plan's."""

    from batchrun.driver.prepare import look
    from batchrun.job.job import Job
    from batchrun.output import manifest, plans
    from batchrun.output.attempt import Receipt
    from batchrun.output.part import Summary

    place = folder / f"{parts}-parts"
    (place / "out/data").mkdir(parents=True)
    table = pa.table({"text": pa.array([""] * parts)})
    pq.write_table(table, place / "in.parquet", row_group_size=1000)
    job = {
        "input": {"path": str(place / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "model": {"name": str(MODEL)},
        "output": {"path": str(place / "out"), "rows_per_part": 1},
    }
    began = time.process_time()
    prepared = look(Job.model_validate(job))
    plans.add(prepared.folder, prepared.plans, prepared.known)
    planned = time.process_time() - began
    output = prepared.output(prepared.identity)
    layout, hashes = output.layout, (prepared.plan.hash, prepared.identity.job_hash)
    receipts = {}
    for i in range(parts):
        (place / "out" / layout.part(i)).write_bytes(b"x")
        summary = Summary("0123456789ab", *hashes, i, 1, 1, 0, 190, 32, {}, finish_reasons={"length": 1})
        receipts[i] = Receipt(layout.part(i), 1, summary, won=True)
    began = time.process_time()
    manifest.write(output, receipts)
    return {
        "plan": planned,
        "manifest": time.process_time() - began,
        "plan_bytes": sum(file.stat().st_size for file in (place / "out/_job/plans").iterdir()),
        "manifest_bytes": (place / "out/_job/manifest.json").stat().st_size,
    }


if __name__ == "__main__":
    main()
