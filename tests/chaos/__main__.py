"""python -m tests.chaos [--seed N] [--minutes M] [--only KIND,KIND] [--round R] [--keep FOLDER]

Rounds, each a job of its own that takes a minute or two, until the time is over. Exit code 0: all came out exact.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import boto3

from tests.support.tiny_models import make_model

from .check import Violation
from .processes import environment, start_store
from .proxy import FaultyProxy
from .schedule import EVENTS, REQUEST_FAULTS
from .storm import Result, Round

KINDS = [*REQUEST_FAULTS, *EVENTS]


def main() -> int:
    args = parse_arguments()
    print(f"seed {args.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind
    with tempfile.TemporaryDirectory(prefix="batchrun-chaos-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model("llama", folder / "model")
        store, place = start_store(folder / "store.log")
        proxy = FaultyProxy(place, args.only)
        try:
            return storm(args, folder, model, proxy, f"http://{place[0]}:{place[1]}")
        finally:
            proxy.close()
            store.kill()
            store.wait()


def storm(args: argparse.Namespace, folder: Path, model: Path, proxy: FaultyProxy, url: str) -> int:
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="chaos", aws_secret_access_key="chaos-secret",
    )  # fmt: skip
    client.create_bucket(Bucket="chaos")
    results: list[Result] = []
    end = time.monotonic() + 60 * args.minutes
    number = args.round or 0
    while not results or (args.round is None and time.monotonic() < end):
        seed = f"{args.seed}-{number}"
        one = Round(seed, folder / f"round-{number}", proxy, client, model, args.only)
        try:
            results.append(one.execute())
            verify(one)
        except Violation as violation:
            print(f"VIOLATION in round {number}: {violation}")
            print(f"faults {dict(one.result.faults)}, ends {dict(one.result.ends)}")
            print(f"again with: python -m tests.chaos --seed {args.seed} --round {number} --keep FOLDER")
            return 1
        show(results[-1])
        number += 1
    print(json.dumps(summary(args.seed, results)))
    return 0


def verify(one: Round) -> None:
    """`batchrun verify` says the same as the round's own check."""
    words = [sys.executable, "-m", "batchrun", "verify", str(one.job), "--json"]
    found = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    if found.returncode != 0:
        raise Violation(f"verify disagrees: {found.stdout[-500:]} {found.stderr[-500:]}")


def show(result: Result) -> None:
    print(
        f"round {result.seed} ({result.kind}): {result.faults.total()} faults, {result.runs} runs, "
        f"{result.requests} requests for {result.rows} rows (at most {result.allowed}), "
        f"{result.seconds:.0f} s; {dict(result.faults)}; ends {dict(result.ends)}",
        flush=True,
    )


def summary(seed: int, results: list[Result]) -> dict[str, object]:
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for result in results:
        faults += result.faults
        ends += result.ends
    return {
        "seed": seed,
        "rounds": len(results),
        "runs": sum(result.runs for result in results),
        "rows": sum(result.rows for result in results),
        "requests": sum(result.requests for result in results),
        "allowed": sum(result.allowed for result in results),
        "faults": dict(faults),
        "faults_in_all": faults.total(),
        "ends": dict(ends),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--minutes", type=float, default=1.0, help="no new round after so long")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=KINDS, help="these kinds of fault, at the same places"
    )  # fmt: skip
    parser.add_argument("--round", type=int, help="this one alone, as it was in a longer run")
    parser.add_argument("--keep", type=Path, help="a folder for the logs of every process")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
