"""A job drawn from a seed, and what must come out of it: worked out from its input alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from tests.support.jobs import dataset

from .check import ANSWERS, Violation
from .rows import DEADLY, OUTSIZE

LONG = "too long " * 40
MAX_BYTES = 200
COLUMNS = ["id", "text", "tags", "place", "kind", "at"]


@dataclass
class Case:
    """`codes` are the errors of the rows that must fail, by row number (`place.x`). One with a `tail` takes seconds
    over its last partitions, which two workers share out between them. With several `ranks` engines are groups of
    them."""

    seed: str
    folder: Path
    model: Path
    rows: int
    tail: bool = False
    ranks: int = 1
    codes: dict[int, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    days: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(f"case {self.seed}")
        self.folder.mkdir(parents=True)
        self.hive = rng.random() < 0.3
        self.workers = rng.choice([1, 2])
        self.slots = rng.choice([1, 2, 2, 3])
        self.flush_rows = rng.choice([10, 50, 200, 2048])
        self.flush_seconds = rng.choice([0.3, 1.0, 3.0, 15.0])
        self.rows_per_part = rng.choice([60, 150, 400, 1000])
        self.max_new_tokens = rng.choice([24, 64])
        # A row takes about 12 or 17 steps: from "as fast as it can" to a few hundred rows a second.
        self.delay = rng.choice([0.0, 0.005, 0.02])
        self.names = rng.choice([{}, {}, {"answer": "reply", "status": "state"}])
        self.carried = rng.choice([None, None, ["place", "text", "kind"]])
        self.row_column = rng.choice([None, None, "source"])
        self.failed = rng.choice([None, "failed"])
        self.threshold = rng.choice([None, None, None, self.rows // 8])
        self.deadly = rng.random() < 0.08
        if self.ranks > 1:
            # Which costs many loads of engines.
            self.deadly = False
        if self.tail:
            self.workers, self.slots, self.threshold, self.deadly = 2, rng.choice([1, 2]), None, False
            self.rows_per_part, self.delay = self.rows // 8 + 1, rng.choice([0.01, 0.02])
        # Rows of the output for each of the input, from a seed of its own: what else is drawn stays as it was.
        self.each = random.Random(f"samples {self.seed}").choice([1, 1, 3])
        self.input = self._poison(rng, dataset(self.rows))
        self._write_input(rng)
        compression = rng.choice(["zstd", "snappy", "gzip", "lz4", "none"])
        group = rng.choice(["rows", "bytes"])
        job: dict[str, Any] = {
            "input": {"path": "in"},
            # With an expression: what only puts columns between texts needs no renderer, which is struck, too.
            "prompt": {"template": "{{ text|string }}", "max_bytes": MAX_BYTES},
            "model": {"name": str(self.model)},
            "generation": {"max_new_tokens": self.max_new_tokens},
            "engine": {"kind": "mirror_engine:MirrorEngine"},
            "output": {
                "path": "out",
                "columns": self.names,
                "rows_per_part": self.rows_per_part,
                "compression": compression,
                "flush_rows": self.flush_rows,
                "flush_seconds": self.flush_seconds,
            },
            "cluster": {"workers": self.workers, "slots": self.slots},
        }
        if self.ranks > 1:
            job["engine"] = {"kind": "mirror_ranks:MirrorRanks", "gpus": self.ranks, "decode_steps": 4}
        if self.each > 1:
            job["generation"].update(temperature=1.0, samples=self.each)
            job["output"]["samples"] = "rows"
        if group == "bytes":
            job["output"]["bytes_per_part"] = 20_000
        if self.carried:
            job["input"]["columns"] = self.carried
        if self.threshold:
            job["input"]["filters"] = [["id", ">=", self.threshold]]
        if self.failed:
            job["output"]["failed"] = self.failed
        if self.row_column:
            job["output"]["row_column"] = self.row_column
        if self.hive and rng.random() < 0.7:
            job["output"]["partition_by"] = ["day"]
        self.partitioned = "partition_by" in job["output"]
        self.ordered = rng.random() < 0.4
        if self.ordered:
            job["input"]["order"] = "prefix"
        self.job = self.folder / "job.yaml"
        self.job.write_text(yaml.safe_dump(job))
        self.out = self.folder / "out"
        self.seen: dict[Path, tuple[int, int]] = {}
        self.rows_seen = 0

    @property
    def is_in_tail(self) -> bool:
        """Whether one partition at most is left that no worker is at."""
        return self.rows_seen >= len(self.wanted) - (self.workers * self.slots + 1) * self.rows_per_part

    def __str__(self) -> str:
        flush = f"staged every {self.flush_rows} rows or {self.flush_seconds} s"
        parts = f"parts of {self.rows_per_part}{', in folders' if self.partitioned else ''}"
        parts += ", rows that begin alike together" if self.ordered else ""
        parts += f", {self.each} samples in rows" if self.each > 1 else ""
        return f"{self.workers} x {self.slots} tasks, {flush}, {parts}, {len(self.expected_codes)} rows must fail"

    def _poison(self, rng: random.Random, table: pa.Table) -> pa.Table:
        """About one row in a hundred that must fail."""
        texts: list[str | None] = table["text"].to_pylist()
        if rng.random() < 0.6:
            for row in rng.sample(range(self.rows), self.rows // 100):
                code = rng.choice(["NULL_PROMPT", "PROMPT_TOO_LONG", "OUT_OF_MEMORY"])
                self.codes[row] = code
                texts[row] = {
                    "NULL_PROMPT": None,
                    "PROMPT_TOO_LONG": f"row {row} {LONG}",
                    "OUT_OF_MEMORY": f"row {row} {OUTSIZE}",
                }[code]
        if self.deadly:
            row = rng.randrange(self.rows)
            texts[row], self.codes[row] = f"row {row} {DEADLY}", "WORKER_CRASH"
        at = table.column_names.index("text")
        return table.set_column(at, "text", pa.array(texts, pa.string()))

    def _write_input(self, rng: random.Random) -> None:
        files = rng.choice([1, 2, 4])
        group = rng.choice([100, 300, 5000])
        cuts = sorted(rng.sample(range(1, self.rows), files - 1))
        for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, self.rows], strict=True)):
            day = f"2026-01-0{number + 1}"
            path = self.folder / "in" / (f"day={day}" if self.hive else "") / f"part-{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self.input.slice(start, end - start), path, row_group_size=group)
            self.places += [f"{path.name}:{i}" for i in range(end - start)]
            self.days += [day] * (end - start)

    @cached_property
    def wanted(self) -> list[int]:
        """The rows that the job answers, in the input's order."""
        rows = list(range(self.rows))
        if self.threshold:
            keep = pc.fill_null(pc.greater_equal(self.input["id"], self.threshold), False).to_pylist()
            rows = [row for row in rows if keep[row]]
        return rows

    @property
    def expected_codes(self) -> dict[int, str]:
        wanted = set(self.wanted)
        return {row: code for row, code in self.codes.items() if row in wanted}

    @cached_property
    def answers_of_rows(self) -> dict[int, str]:
        """What the engine makes of each row that it can answer."""
        texts = self.input["text"].to_pylist()
        return {
            row: texts[row][::-1][: self.max_new_tokens] for row in range(self.rows) if row not in self.codes
        }

    def look(self) -> None:
        """Holds every part that a reader sees now against the input; each one once, unless it changes.

        Raises:
            Violation: a part that is not whole, one that vanished or changed, or something else in data/.
        """
        there = {path: stamp(path) for path in (self.out / "data").rglob("*") if path.is_file()}
        for path, was in self.seen.items():
            if there.get(path) != was:
                raise Violation(f"{path.name} was there and is gone or replaced")
        for path in there.keys() - self.seen.keys():
            self.rows_seen += len(self.check_part(path))
            self.seen[path] = there[path]

    def check_part(self, path: Path) -> list[int]:
        """The numbers of its rows."""
        if not path.name.startswith("part-") or path.suffix != ".parquet":
            raise Violation(f"{path} is no part")
        try:
            table = pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError) as error:
            raise Violation(f"{path} cannot be read: {error}") from error
        rows = self.check_rows(table, path.name)
        start = self.wanted.index(rows[0]) if rows else 0
        stretch = rows == self.wanted[start : start + len(rows)]
        if self.ordered:
            stretch = len({*rows} & {*self.wanted}) == len(rows)
        if not stretch or len(rows) > self.rows_per_part:
            raise Violation(
                f"{path.name} holds rows {rows[:3]}... ({len(rows)}), not a partition of the input"
            )
        return rows

    def check_rows(self, table: pa.Table, what: str) -> list[int]:
        """That each row has its own columns, its own answer, and an error only where it must fail; of several samples
        in rows, each. The rows of the input."""
        rows = [place["x"] for place in table["place"].to_pylist()]
        if self.each > 1:
            samples = [*range(self.each)] * (len(rows) // self.each)
            whole = [row for row in rows[:: self.each] for _ in range(self.each)]
            if table["sample"].to_pylist() != samples or rows != whole:
                raise Violation(f"{what} holds other samples than {self.each} of each row")
        carried = self.carried or COLUMNS
        if not table.select(carried).equals(self.input.select(carried).take(rows)):
            raise Violation(f"{what} holds input columns that are not the input's")
        answers = {name: table[self.names.get(name, name)].to_pylist() for name in ANSWERS}
        for i, row in enumerate(rows):
            found = {name: values[i] for name, values in answers.items()}
            self.check_answer(row, found, what)
        if self.row_column:
            for row, place in zip(rows, table[self.row_column].to_pylist(), strict=True):
                if place.rsplit("/", 1)[-1] != self.places[row]:
                    raise Violation(f"{what}: row {row} is said to be {place}, not {self.places[row]}")
        return rows[:: self.each]

    def check_answer(self, row: int, found: dict[str, Any], what: str) -> None:
        code = self.codes.get(row)
        if code is None:
            answer = self.answers_of_rows[row]
            length = len(self.input["text"][row].as_py())
            wanted = (answer, "length", length, len(answer), "ok", None)
            if tuple(found[name] for name in ANSWERS) != wanted:
                raise Violation(f"{what}: row {row} has {found}, not {wanted}")
        elif found["status"] != "failed" or not str(found["error"]).startswith(f"{code}:"):
            raise Violation(f"{what}: row {row} has {found}, not {code}")

    def finish(self) -> None:
        """The output as a reader opens it holds every row once.

        Raises:
            Violation: it does not.
        """
        self.look()
        table = ds.dataset(self.out / "data", format="parquet", partitioning="hive").to_table()
        rows = self.check_rows(table, "the output")
        if sorted(rows) != self.wanted:
            raise Violation(f"{len(rows)} rows, {len(set(rows))} different ones, of {len(self.wanted)}")
        if self.partitioned and [str(day) for day in table["day"].to_pylist()[:: self.each]] != [
            self.days[row] for row in rows
        ]:
            raise Violation("rows are in other folders than their day's")
        if self.failed:
            folder = self.out / "failed"
            names = list(folder.rglob("*.parquet"))
            found = [p["x"] for path in names for p in pq.ParquetFile(path).read()["place"].to_pylist()]
            if sorted(found) != sorted([*self.expected_codes] * self.each):
                raise Violation(f"failed/ holds rows {sorted(found)}, not {sorted(self.expected_codes)}")

    def durable(self) -> set[int]:
        """The answered rows that the output holds, in parts and staged."""
        found = set()
        for path in (self.out / "data").rglob("*.parquet"):
            found.update(place["x"] for place in pq.ParquetFile(path).read(["place"])["place"].to_pylist())
        for path in (self.out / "_job/stage").rglob("*.chunk"):
            with open(path, "rb") as file:
                for answer in pq.read_table(file, columns=["answer"])["answer"].to_pylist():
                    if answer is not None:
                        found.add(self.row_of_answer[answer])
        return found

    @cached_property
    def row_of_answer(self) -> dict[str, int]:
        return {answer: row for row, answer in self.answers_of_rows.items()}


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
