"""How much of a run's end engines have nothing to do: two engines, one at half the speed of the other.

    python -m tests.measure.tail [--partitions 40] [--rows 150] [--step 0.01] [--code CHECKOUT] [--repeat 1]

Rows of skewed lengths through `batchrun run` as a user starts it. The engines sleep, so that their speed is the same on
a busy machine, and note when they run empty. With the defaults a run takes about three minutes. `--code` measures
another checkout of batchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SUPPORT = Path(__file__).parents[1] / "support"
sys.path.append(str(SUPPORT))

from paced_engine import ROOM, SLOW, SLOWNESS, STEP  # noqa: E402
from tiny_models import make_model  # noqa: E402

TAIL = 0.05


def main() -> None:
    args = parse_arguments()
    for seed in range(args.seed, args.seed + args.repeat):
        with tempfile.TemporaryDirectory(prefix="batchrun-tail-") as scratch:
            print(json.dumps(measure(Path(scratch), args, seed)), flush=True)


def measure(folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    lengths = write_job(folder, args, seed)
    (folder / "log").mkdir()
    path = os.pathsep.join([str(SUPPORT), str(args.code), str(SUPPORT.parents[1])])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "BATCHRUN_TEST_LOG": str(folder / "log"),
        STEP: str(args.step),
        SLOW: str(folder / "slow"),
    }
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "batchrun", "run", "job.yaml", "--json"],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    table = pq.read_table(folder / "out" / "data")
    if table["answer"].to_pylist() != table["text"].to_pylist() or len(table) != len(lengths):
        raise SystemExit("the output is wrong")
    logs = [read(file) for file in (folder / "log").iterdir()]
    first = min(at for log in logs for at, what in log if what == "busy")
    last = max(at for log in logs for at, what in log if what.startswith("row"))
    window = TAIL * (last - first)
    idle = [idle_time(log, last - window, last) for log in logs]
    record = json.loads(max((folder / "out/_job/runs").glob("*.json")).read_text())
    speed = ROOM / args.step * (1 + 1 / SLOWNESS)
    return {
        "seed": seed,
        "generating": round(last - first, 2),
        "ideal": round(float(lengths.sum()) / speed, 2),
        "whole": round(time.time() - started, 2),
        "idle_in_tail": [round(one, 3) for one in idle],
        "share": round(sum(idle) / (window * len(logs)), 4),
        "generated_twice": sum(what.startswith("row") for log in logs for _, what in log) - len(lengths),
        "handed_over": record["counts"].get("handed_over", 0),
    }


def write_job(folder: Path, args: argparse.Namespace, seed: int) -> np.ndarray[Any, Any]:
    """Tokens of each row, which are its prompt's and its answer's."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.9, 0.7, args.partitions * args.rows), 12, 240).astype(int)
    texts = [f"row {i} ".ljust(length, "x") for i, length in enumerate(lengths)]
    pq.write_table(pa.table({"text": texts}), folder / "in.parquet", row_group_size=args.rows)
    job = {
        "input": {"path": "in.parquet"},
        "prompt": {"template": "{{ text }}"},
        "model": {"name": str(make_model("llama", folder / "model"))},
        "generation": {"max_new_tokens": 256},
        "engine": {"kind": "paced_engine:PacedEngine"},
        "output": {"path": "out", "rows_per_part": args.rows},
        "cluster": {"workers": 2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return lengths


def read(file: Path) -> list[tuple[float, str]]:
    lines = (line.split(" ", 1) for line in file.read_text().splitlines())
    return [(float(at), what) for at, what in lines]


def idle_time(log: list[tuple[float, str]], begin: float, end: float) -> float:
    """Seconds between the two moments in which the engine had no row."""
    changes = [(at, what) for at, what in log if what in ("idle", "busy")]
    seconds, since = 0.0, -np.inf
    for at, what in [*changes, (np.inf, "busy")]:
        if what == "idle":
            since = at if since is None else since
        elif since is not None:
            seconds += max(0.0, min(at, end) - max(since, begin))
            since = None
    return seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--partitions", type=int, default=40)
    parser.add_argument("--rows", type=int, default=150, help="of each partition")
    parser.add_argument("--step", type=float, default=0.01, help="seconds for a token of each row at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1, help="so many runs, each with a seed of its own")
    parser.add_argument("--code", type=Path, default=SUPPORT.parents[1])
    return parser.parse_args()


if __name__ == "__main__":
    main()
