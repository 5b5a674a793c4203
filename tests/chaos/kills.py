"""python -m tests.chaos.kills [--seed N] [--kills K] [--signals S] [--tail | --ranks] [--only NUMBER] [--keep FOLDER]

Outputs, each a job of its own that is killed and stopped until it is complete, until there were so many kills and
signals. Exit code 0: every promise held. What is checked comes from the documentation alone, not from the code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.tiny_models import make_model

from .case import Case
from .check import Violation
from .ordeal import Ordeal
from .strikes import KILLS, KILLS_OF_RANKS, MOST, strikes
from .totals import Totals


def main() -> int:
    args = parse_arguments()
    print(f"seed {args.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="batchrun-kills-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model("llama", folder / "model")
        return kill(args, folder, model)


def kill(args: argparse.Namespace, folder: Path, model: Path) -> int:
    totals = Totals()
    violations, number, started = 0, args.only or 0, time.monotonic()
    enough = False
    try:
        while not enough:
            violations += not held(args, folder, model, number, totals)
            number += 1
            enough = totals.kills.total() >= args.kills and totals.signals.total() >= args.signals
            enough |= args.only is not None or (violations > 0 and not args.go_on)
    finally:
        # Also of a run that is stopped.
        found = {"seed": args.seed, "violations": violations, "seconds": round(time.monotonic() - started)}
        sums = {"kills_in_all": totals.kills.total(), "signals_in_all": totals.signals.total()}
        print(json.dumps({**found, **sums, **vars(totals)}), flush=True)
    return 1 if violations else 0


def held(args: argparse.Namespace, folder: Path, model: Path, number: int, totals: Totals) -> bool:
    """Whether every promise held for this output."""
    seed = f"{args.seed}-{number}"
    case = Case(seed, folder / f"output-{number}", model, args.rows, args.tail, 2 if args.ranks else 1)
    print(f"output {number}: {case}", flush=True)
    try:
        only, kills = "tail" if args.tail else None, KILLS_OF_RANKS if args.ranks else KILLS
        struck = strikes(seed, args.strikes, only=only, kills=kills)
        Ordeal(case, struck, totals, args.stop_seconds).execute()
    except Violation as violation:
        print(f"VIOLATION in output {number}: {violation}")
        print(
            f"again with: python -m tests.chaos.kills --seed {args.seed} --only {number} --keep FOLDER",
            flush=True,
        )
        return False
    shutil.rmtree(case.folder)
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2000, help="of each input")
    parser.add_argument("--strikes", type=int, default=MOST, help="at one output, at most")
    parser.add_argument(
        "--stop-seconds", type=float, default=5.0, help="that a stop may take; more on a busy machine"
    )
    parser.add_argument("--only", type=int, help="this output alone, as it was in a longer run")
    parser.add_argument(
        "--keep", type=Path, help="a folder for inputs, outputs and logs; what held is deleted"
    )
    parser.add_argument(
        "--tail", action="store_true", help="all strikes while the last partitions are shared out"
    )
    parser.add_argument(
        "--ranks", action="store_true", help="engines over two ranks, which are killed and paused too"
    )
    parser.add_argument("--go-on", action="store_true", help="with the next output after a violation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
