"""How a run scales over the GPUs of one machine: the same rows on one, two, four, ... of them.

    python -m tests.measure.scaling ROWS.parquet --column description [--gpus 1 2 4 8] [--copies 4]

Random weights of the Qwen3-0.6B shape, 32 new tokens a row, `batchrun run` as a user starts it, with its default
partitions. The rows are repeated so that one GPU has minutes of work. A short run before them fills the caches of
compiled code. A GPU is busy where NVML's samples say so; the driver's CPU time is its process's own, between the first
row and the last; requests to the store are counted where they leave batchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

POLL = 0.2
TAIL = 0.05
WARM_UP_ROWS = 6_000
COUNTING = Path(__file__).with_name("counting")


@dataclass
class Samples:
    """What was seen every POLL seconds: when, each GPU's use in %, the driver's CPU seconds, bytes of memory."""

    at: list[float] = field(default_factory=list)
    use: list[list[int]] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    driver_memory: int = 0
    all_memory: int = 0

    def window(self, begin: float, end: float) -> list[int]:
        return [i for i, at in enumerate(self.at) if begin <= at <= end]


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="batchrun-scaling-") as scratch:
        folder = args.folder or Path(scratch)
        rows = make_job(folder, args)
        if not (folder / "warm-up").exists():
            run(folder, "warm-up", visible()[:1], limit=min(rows, WARM_UP_ROWS))
        print(f"{rows:,} rows, {gpu_name()}, {os.cpu_count()} CPU cores", flush=True)
        print(HEAD, flush=True)
        known = folder / "figures.json"
        found = json.loads(known.read_text()) if known.exists() else {}
        for count in args.gpus:
            found[str(count)] = run(folder, f"out-{count}", visible()[:count])
            known.write_text(json.dumps(found))
            fewest = min(found, key=int)
            print(line(count, found[str(count)], rows, (int(fewest), found[fewest])), flush=True)
            print(f"      {json.dumps(found[str(count)]['milestones'])}", flush=True)


def make_job(folder: Path, args: argparse.Namespace) -> int:
    """The model, the rows and the job, unless the folder has them already; returns the number of rows."""
    if not (folder / "model").exists():
        # In a process of its own: whoever measures must not hold a CUDA context.
        subprocess.run([sys.executable, "-c", MAKE_MODEL, str(folder / "model"), args.shape], check=True)
    if not (rows := folder / "rows.parquet").exists():
        texts = pq.read_table(args.rows, columns=[args.column])[args.column].to_pylist()
        # Rows that were the same would be generated once.
        copies = [f"{copy} {text}" for copy in range(args.copies) for text in texts]
        pq.write_table(pa.table({"text": copies}), rows, row_group_size=65_536)
    job = {
        "input": {"path": "rows.parquet"},
        "prompt": {"template": "Describe: {{ text }}", "truncate": "right"},
        "model": {"name": "model"},
        "generation": {"max_new_tokens": 32},
        "engine": {"kind": args.engine},
        "output": {"path": "out"},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return int(pq.read_metadata(rows).num_rows)


def run(folder: Path, output: str, gpus: list[str], limit: int | None = None) -> dict[str, Any]:
    """One run on these GPUs and what was seen of it."""
    requests = folder / f"{output}.requests"
    requests.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "COUNT_REQUESTS": str(requests)}
    environment["PYTHONPATH"] = os.pathsep.join([str(COUNTING), os.environ.get("PYTHONPATH", os.getcwd())])
    words = ["run", "job.yaml", "--set", f"output.path={output}"]
    if not gpus:
        environment.pop("CUDA_VISIBLE_DEVICES")
    if limit is not None:
        words += ["--set", f"input.limit={limit}"]
    started = time.time()
    with (folder / f"{output}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "batchrun", *words], cwd=folder, env=environment, stdout=log, stderr=log
        )
        samples = Samples()
        watcher = threading.Thread(target=watch, args=(process, gpus, samples))
        watcher.start()
        code = process.wait()
        seconds = time.time() - started
        watcher.join()
    if code:
        raise SystemExit(f"{output}: exit code {code}\n{(folder / f'{output}.log').read_text()[-3000:]}")
    record = json.loads(max((folder / output / "_job/runs").glob("*.json")).read_text())
    milestones = record["milestones"]
    # Milestones count from the creation of the command's process.
    first, last = started + milestones["first row"], started + milestones["last row"]
    inside, tail = samples.window(first, last), samples.window(last - TAIL * (last - first), last)
    return {
        "seconds": seconds,
        "work": last - first,
        "busy": [sum(samples.use[i][g] for i in inside) / max(1, len(inside)) for g in range(len(gpus))],
        "tail": TAIL * (last - first),
        "idle": [sum(samples.use[i][g] == 0 for i in tail) * POLL for g in range(len(gpus))],
        "driver": cores(samples, inside),
        "requests": sum(path.stat().st_size for path in requests.iterdir()),
        "driver_memory": samples.driver_memory,
        "all_memory": samples.all_memory,
        "milestones": milestones,
    }


def watch(process: subprocess.Popen[Any], gpus: list[str], samples: Samples) -> None:
    driver = psutil.Process(process.pid)
    handles = gpu_handles(gpus)
    while process.poll() is None:
        try:
            used = driver.cpu_times()
            memory = driver.memory_info().rss
        except psutil.Error:
            break
        samples.at.append(time.time())
        samples.use.append([handle() for handle in handles])
        samples.driver.append(used.user + used.system)
        samples.driver_memory = max(samples.driver_memory, memory)
        samples.all_memory = max(samples.all_memory, memory + children_memory(driver))
        time.sleep(POLL)


def children_memory(driver: psutil.Process) -> int:
    total = 0
    try:
        children = driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    for child in children:
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    return total


def gpu_handles(gpus: list[str]) -> list[Any]:
    if not gpus:
        return []
    import pynvml

    pynvml.nvmlInit()

    def use(handle: Any) -> Any:
        return lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    return [use(pynvml.nvmlDeviceGetHandleByIndex(int(gpu))) for gpu in gpus]


def cores(samples: Samples, inside: list[int]) -> float:
    """CPU seconds of the driver's process in each second."""
    if len(inside) < 2:
        return 0.0
    first, last = inside[0], inside[-1]
    return (samples.driver[last] - samples.driver[first]) / (samples.at[last] - samples.at[first])


HEAD = (
    "GPUs     rows/s  first to last row  speedup    total  speedup  busy of each, %            "
    "idle in the last 5%, s   driver cores  requests  memory of the driver, of all"
)


def line(count: int, figures: dict[str, Any], rows: int, alone: tuple[int, dict[str, Any]]) -> str:
    base, one = alone
    busy = " ".join(f"{share:.0f}" for share in figures["busy"])
    idle = " ".join(f"{seconds:.1f}" for seconds in figures["idle"])
    return (
        f"{count:4} {rows / figures['work']:10,.0f} {figures['work']:16.1f} s "
        f"{base * one['work'] / figures['work']:8.2f} {figures['seconds']:6.1f} s "
        f"{base * one['seconds'] / figures['seconds']:8.2f}  {busy:26} {idle:>8} of {figures['tail']:4.1f} "
        f"{figures['driver']:17.2f} {figures['requests']:9,} "
        f"{figures['driver_memory'] / 2**30:8.2f} GiB, {figures['all_memory'] / 2**30:.1f} GiB"
    )


def visible() -> list[str]:
    from batchrun.telemetry.gpu import visible_gpus

    return visible_gpus()


def gpu_name() -> str:
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


MAKE_MODEL = """
import json, sys
from pathlib import Path
sys.path.append("tests/support")
import real_rows
folder = real_rows.model_folder(getattr(real_rows, sys.argv[2]), Path(sys.argv[1]))
config = folder / "tokenizer_config.json"
config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 8032}))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="a Parquet file")
    parser.add_argument("--column", default="text")
    parser.add_argument("--copies", type=int, default=4, help="how often the rows are repeated")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--folder", type=Path, help="kept, and gone on with; otherwise a temporary one")
    parser.add_argument("--shape", default="LARGE", help="of tests/support/real_rows.py")
    parser.add_argument("--engine", default="paged")
    return parser.parse_args()


if __name__ == "__main__":
    main()
