"""What a partition costs when there are many: time per component, the driver's memory, and a late resumption.

    python -m tests.measure.partitions [--partitions 100000] [--rows 2] [--workers 1] [--folder FOLDER]

Partitions of a few rows through the instant engine on a local disk, the runs in processes of their own: one from
nothing, one after 1% of the parts and the manifest were deleted, one with nothing left to do. CPU times are the
kernel's, by thread: Dask's scheduler and client share the driver process's event loop.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

GROUP_ROWS = 100  # a partition inside a row group decodes the rows before it: small groups keep that small
FILE_ROWS = 2000
POLL = 0.05


def main() -> None:
    args = parse_arguments()
    if args.once:
        print(json.dumps(run_once(args.folder / "job.yaml")))
        return
    with tempfile.TemporaryDirectory(prefix="batchrun-measure-") as scratch:
        folder = args.folder or Path(scratch)
        make_job(folder, args)
        print(f"{args.partitions:,} partitions of {args.rows} rows, {args.workers} workers, in {folder}")
        show("from nothing", measure(folder), args.partitions)
        late = delete_some(folder / "out", args.partitions // 100)
        show("with 99% done", measure(folder), late)
        show("with nothing to do", measure(folder), 0)


def make_job(folder: Path, args: argparse.Namespace) -> None:
    from tests.support.tiny_models import make_model

    make_model("llama", folder / "model")
    (folder / "in").mkdir()
    rows = args.partitions * args.rows
    for first in range(0, rows, FILE_ROWS):
        texts = [f"row {i}" for i in range(first, min(first + FILE_ROWS, rows))]
        pq.write_table(
            pa.table({"text": texts}), folder / f"in/{first:09}.parquet", row_group_size=GROUP_ROWS
        )
    job = {
        "input": {"path": "in"},
        "prompt": {"template": "{{ text }}"},
        "model": {"name": "model"},
        "generation": {"max_new_tokens": 16},
        "engine": {"kind": "batchrun.engine.instant:InstantEngine"},
        "output": {"path": "out", "rows_per_part": args.rows},
        "cluster": {"workers": args.workers},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def measure(folder: Path) -> dict[str, Any]:
    """Figures of a run in a new process, and the seconds until its first new part is there."""
    data = folder / "out/data"
    before = data.stat().st_mtime_ns if data.exists() else 0
    started, first = time.monotonic(), None
    command = [sys.executable, "-m", "tests.measure.partitions", "--once", "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if first is None and data.exists() and data.stat().st_mtime_ns != before:
                first = time.monotonic() - started
            time.sleep(POLL)
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0, "the run failed"
    return {**json.loads(out), "process": time.monotonic() - started, "first_part": first}


def run_once(job: Path) -> dict[str, Any]:
    """One run in this process; seconds of CPU by component, peak memory in bytes."""
    import batchrun

    imported = time.process_time()
    others = {"worker": 0.0, "engine": 0.0}

    def look(_: object) -> None:
        """The workers' CPU times so far: they are gone when the run is through."""
        now = {"worker": 0.0, "engine": 0.0}
        for child in psutil.Process().children(recursive=True):
            try:
                words, used = " ".join(child.cmdline()), child.cpu_times()
            except psutil.Error:
                continue
            kind = "engine" if "batchrun.engine.server" in words else "worker"
            now[kind] += used.user + used.system
        others.update({kind: max(others[kind], now[kind]) for kind in now})
        threads.update(cpu_by_thread())

    threads: dict[str, float] = {}
    result = batchrun.run(job, on_progress=look)
    total = time.process_time()
    loop = threads.get("IO loop", 0.0)
    return {
        "seconds": result.seconds,
        "requests": result.requests,
        "import": imported,
        "loop": loop,
        "driver": total - imported - loop,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **others,
    }


def cpu_by_thread() -> dict[str, float]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used: dict[str, float] = {}
    for thread in psutil.Process().threads():
        name = names.get(thread.id, "other")
        used[name] = used.get(name, 0.0) + thread.user_time + thread.system_time
    return used


def delete_some(output: Path, count: int) -> int:
    """Undoes the last parts and the success marker, as a run killed shortly before its end leaves them."""
    parts = sorted(os.listdir(output / "data"))[-count:]
    for name in parts:
        (output / "data" / name).unlink()
    (output / "_job/manifest.json").unlink()
    return len(parts)


def show(name: str, figures: dict[str, Any], partitions: int) -> None:
    per = max(1, partitions)
    first = "none" if figures["first_part"] is None else f"{figures['first_part']:.1f} s"
    print(
        f"{name}: {figures['process']:.1f} s in all, first new part after {first}, "
        f"driver process at most {figures['memory'] / 2**20:,.0f} MiB, {figures['requests']:,} requests"
    )
    for kind in ("driver", "loop", "worker", "engine"):
        each = f"{figures[kind] / per * 1000:8.2f} ms each" if partitions else ""
        print(f"    CPU, {LABELS[kind]:34}{figures[kind]:9.1f} s{each}")


LABELS = {
    "driver": "driver (plan, listing, manifest)",
    "loop": "event loop (scheduler, client)",
    "worker": "workers",
    "engine": "engines",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--partitions", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2, help="of a partition; divides 100")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty one, kept; otherwise a temporary one")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
