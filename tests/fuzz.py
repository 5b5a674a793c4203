"""Damaged bytes at every border where batchrun reads something: a typed error, or the truth, and nothing else.

    python tests/fuzz.py --count 20000 --seed 1 [--target plan ...]

Each input is a good file with a few random changes (flipped bits, cut, spliced, swapped for another). A target
says "refused" where the file was refused by a typed error or skipped, "same" where what was read is what the
good file holds, and raises where damage passed for the truth.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchrun.dataset.plan import Plan
from batchrun.dataset.planner import make_plan
from batchrun.dataset.reader import read_partition
from batchrun.errors import BatchrunError
from batchrun.job.job import Job
from batchrun.job.settings import InputSettings
from batchrun.output import chunk, identity, lease, manifest, verify
from batchrun.output.chunk import ANSWERS, BadChunk, Origin
from batchrun.output.identity import Identity
from batchrun.output.layout import JOB, LEASE, MANIFEST
from batchrun.output.lease import Lease
from batchrun.storage import Folder

sys.path.insert(0, str(Path(__file__).parent / "support"))
from parts import JOB_HASH, PLAN_HASH, answers, carried, commit, layout, output, unique

SECONDS = 90  # for one input; pyarrow takes seconds over a page header that does not end
MEMORY = 12 << 30  # so that a length that lies fails to allocate instead of taking the machine down

# What a target makes of damaged bytes: "refused" or "same".
Check = Callable[[bytes], str]


class Survived(AssertionError):
    """Damage that was taken for the truth."""


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` with one to four changes; Parquet keeps its secrets near the end, so half of them are there."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at = rng.randrange(size) if size else 0
        if size and rng.random() < 0.5:
            at = size - 1 - int(rng.random() ** 2 * min(size, 2000))
        length = min(size - at, rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        kind = rng.choice(
            ("bit", "bit", "byte", "byte", "zero", "cut", "insert", "end", "twice", "splice", "swap")
        )
        if kind == "bit" and size:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == "byte" and size:
            data = (
                data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]
            )
        elif kind == "zero":
            data = data[:at] + bytes(length) + data[at + length :]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "insert":
            data = data[:at] + rng.randbytes(length) + data[at:]
        elif kind == "end":
            data = data[:at]
        elif kind == "twice":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == "splice":
            other = rng.choice(others)
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        elif kind == "swap" and rng.random() < 0.2:
            data = rng.choice(others)
    return data


def job_file(folder: Path) -> tuple[list[bytes], Check]:
    job = {
        "input": {"path": "in.parquet", "columns": ["a"], "filters": [["a", ">", 1]], "limit": 5},
        "prompt": {"messages": [{"role": "user", "content": "{{ a }} ${HOME}"}], "truncate": "left"},
        "model": {"name": "m", "dtype": "auto"},
        "generation": {"max_new_tokens": 8, "stop": ["x"], "temperature": 0.5},
        "output": {"path": "out", "columns": {"answer": "b"}, "flush_seconds": 1.5},
        "limits": {"max_error_rate": 0.1},
    }
    good = yaml.safe_dump(job).encode()
    odd = b"a: &a [1, *a]\nb: {? [x] : y}\n--- !!python/object:os.system {}\nc: 1_0:2e400\n"
    path = folder / "job.yaml"

    def check(data: bytes) -> str:
        path.write_bytes(data)
        before = Job.load(path)
        # A changed job is another job; it must say so to itself in every process alike.
        again = Job.load(path)
        if before != again or json.dumps(before.deciding()) != json.dumps(again.deciding()):
            raise Survived("one file, two jobs")
        return "same"

    return [good, odd, json.dumps(job).encode()], check


def chunks(folder: Path) -> tuple[list[bytes], Check]:
    mine = Origin(PLAN_HASH, JOB_HASH, 3)
    table = answers(3, range(40), "a", failed=[5])
    good = chunk.encode(table, mine, "a")
    others = [
        chunk.encode(answers(4, range(40), "b"), Origin(PLAN_HASH, JOB_HASH, 4), "b"),
        chunk.encode(table.slice(0, 7), Origin(JOB_HASH, PLAN_HASH, 3), "c"),
        b"<html>not found</html>",
    ]

    def check(data: bytes) -> str:
        read = chunk.decode(data, mine, 40)
        if not read.equals(table.cast(ANSWERS)):
            raise Survived("another table")
        return "same"

    return [good, *others], check


def documents(folder: Path) -> tuple[list[bytes], Check]:
    """job.json, manifest.json and the lease, each damaged, and each in another's place."""
    place = Folder(str(folder / "out"))
    pinned = Identity(PLAN_HASH, JOB_HASH, {"a": [1, None, "ü"], "b": {"c": 0.5}}, "model", "0")
    identity.pin(place, pinned)
    plan = layout(2)
    commit(place, plan, 0, 3)
    commit(place, plan, 1, 2)
    written = manifest.write(output(place, plan, [3, 2]))
    with Lease(place):
        holder = lease.read(place)
        good = [place.read(key) for key in (JOB, MANIFEST, LEASE)]

    def check(data: bytes) -> str:
        seen = []
        for key, read, truth in (
            (JOB, identity.read, pinned), (MANIFEST, manifest.read, written), (LEASE, lease.read, holder),
        ):  # fmt: skip
            (folder / "out" / key).write_bytes(data)
            try:
                value = read(place)  # type: ignore[operator]
            except BatchrunError:
                continue
            if value not in (truth, None) or (value is None and key != LEASE):
                raise Survived(f"{key}: {value}")
            seen.append(value)
        return "same" if any(seen) else "refused"

    return good, check


def plans(folder: Path) -> tuple[list[bytes], Check]:
    made = []
    for rows in (30, 17):
        path = folder / f"{rows}.parquet"
        pq.write_table(pa.table({"a": range(rows), "b": ["x"] * rows}), path, row_group_size=8)
        made.append(make_plan(InputSettings(path=str(path)), ["a"], 7, 1 << 20))
    truth = made[0].to_parquet()

    def check(data: bytes) -> str:
        plan = Plan.from_parquet(data)
        if plan.hash != made[0].hash:
            if plan.hash == made[1].hash:
                return "same"  # another plan, whole; job.json's hash tells it apart
            raise Survived("another plan")
        if plan.partitions != made[0].partitions or not plan.schema.equals(made[0].schema):
            raise Survived("the same hash, another plan")
        return "same"

    return [truth, made[1].to_parquet()], check


def inputs(folder: Path) -> tuple[list[bytes], Check]:
    """A data file with checksums: rows are the truth, or refused. Its footer is nobody's promise but its own, so
    that a changed name or type may pass for a dataset, but never with another number of rows than was planned."""
    path = folder / "in.parquet"
    table = pa.table({
        "id": pa.array([None if i % 5 == 0 else i for i in range(60)], pa.int64()),
        "text": [f"row {i} " + "x" * (i % 7) for i in range(60)],
        "tags": [[str(i)] * (i % 3) for i in range(60)],
    })  # fmt: skip
    pq.write_table(table, path, row_group_size=20, write_page_checksum=True)
    good = path.read_bytes()
    pq.write_table(table.slice(0, 9).rename_columns(["a", "text", "b"]), path)
    others = [path.read_bytes(), b"PAR1" * 8, b""]
    options = InputSettings(path=str(path))

    def check(data: bytes) -> str:
        path.write_bytes(data)
        plan = make_plan(options, ["text"], 16, 1 << 20)
        rows = 0
        for partition in plan.partitions:
            files = plan.files_of(partition)
            for batch in read_partition(
                partition.slices, files, plan.schema, plan.schema.names, None, {}, {}
            ):
                batch.records.validate(full=True)
                rows += batch.records.num_rows
        if rows != plan.rows:
            raise Survived(f"{rows} rows of {plan.rows}")
        return "same"

    return [good, *others], check


def output_parts(folder: Path) -> tuple[list[bytes], Check]:
    """A part in data/, under `run` (which looks at its footer) and under `verify` (which reads all of it)."""
    place, plan, rows = Folder(f"memory://{unique('fuzz')}"), layout(2), [40, 40]
    for i in (0, 1):
        commit(place, plan, i, rows[i], compression="zstd")
    manifest.write(output(place, plan, rows))
    key = plan.part(0)
    good, other = place.read(key), place.read(plan.part(1))
    truth = pq.read_table(pa.BufferReader(good))

    def check(data: bytes) -> str:
        place.put(key, data)
        found = verify.verify(output(place, plan, rows), lambda i: carried(i, rows[i]))
        if found.problems:
            return "refused"
        read = pq.read_table(pa.BufferReader(data))
        if not read.equals(truth):
            raise Survived("verified, and another table")
        return "same"

    return [good, other, good[: len(good) // 2]], check


TARGETS = {
    "job": job_file, "chunk": chunks, "document": documents, "plan": plans, "input": inputs, "part": output_parts,
}  # fmt: skip


def fuzz(target: str, count: int, seed: int) -> Counter[str]:
    """How often damage was refused, how often it changed nothing, and what went wrong (`failed ...`)."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        samples, check = TARGETS[target](Path(scratch))
        for i in range(count):
            rng = random.Random(f"{target} {seed} {i}")
            original = samples[0] if rng.random() < 0.7 else rng.choice(samples)
            data = mutated(original, samples, rng)
            signal.alarm(SECONDS)
            try:
                outcome = check(data)
            except (BatchrunError, BadChunk) as error:
                str(error).encode()
                outcome = "refused"
            except Exception as error:
                outcome = f"failed with {type(error).__name__}: {error}"[:300]
                print(f"{target} --seed {seed}, input {i}: {outcome}", file=sys.stderr)
            finally:
                signal.alarm(0)
            outcomes[outcome.split(":")[0]] += 1
    return outcomes


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--count", type=int, default=1000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--target", choices=TARGETS, nargs="*", default=list(TARGETS))
    asked = words.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_slow(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    bad = False
    for target in asked.target:
        started = time.monotonic()
        outcomes = fuzz(target, asked.count, asked.seed)
        bad |= any(outcome.startswith("failed") for outcome in outcomes)
        print(
            f"{target}: {asked.count} inputs, {dict(outcomes)}, {time.monotonic() - started:.1f} s",
            flush=True,
        )
    sys.exit(bad)


if __name__ == "__main__":
    main()
