"""What `input.order: prefix` saves, and what it costs: prompt tokens computed, planning, reading.

    python -m tests.measure.order [--rows 200000] [--documents 500] [--length 2000] [--folder FOLDER]

A table of short questions about long documents in random order, planned in processes of their own with and without the
order. Then the engine's own scheduler and page pool, without a model, over each partition's prompts: an engine that
knows nothing of the partition before it. The prompt's pieces are tokenized one by one: documents repeat.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 10_000
NEW_TOKENS = 32
WINDOW = 8192
COLUMNS = ("document", "question")


def main() -> None:
    args = parse_arguments()
    if args.once is not None:
        print(json.dumps(plan_once(args.folder, args.once or None)))
        return
    with tempfile.TemporaryDirectory(prefix="batchrun-measure-") as scratch:
        folder = args.folder or Path(scratch)
        make_table(folder / "in.parquet", args)
        print(f"{args.rows:,} rows, {args.documents} documents of {args.length:,} characters")
        for order in ("", "prefix"):
            words = [sys.executable, "-m", "tests.measure.order", "--folder", str(folder), "--once", order]
            figures = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
            show(order or "as it stands", figures, count(folder, order or None, args.pages))


def make_table(path: Path, args: argparse.Namespace) -> None:
    chance = np.random.default_rng(0)
    words = [f"w{i:x}" for i in range(4000)]
    documents = [
        " ".join(chance.choice(words, args.length // 5))[: args.length] for _ in range(args.documents)
    ]
    which = chance.integers(0, args.documents, args.rows)
    questions = [f"what about {words[a]} and {words[b]} in {i}?" for i, (a, b) in enumerate(
        chance.integers(0, 4000, (args.rows, 2)))]  # fmt: skip
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, args.rows, GROUP_ROWS):
            rows = slice(first, first + GROUP_ROWS)
            columns = [[documents[i] for i in which[rows]], questions[rows]]
            writer.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True)), schema=schema))


def plan_of(folder: Path, order: str | None) -> tuple[Any, Any]:
    from batchrun.dataset.planner import make_plan
    from batchrun.job.settings import InputSettings

    settings = InputSettings(path=str(folder / "in.parquet"), order=order)
    return settings, make_plan(settings, COLUMNS, 8192, 256 << 20, leading=COLUMNS)


def plan_once(folder: Path, order: str | None) -> dict[str, float]:
    import batchrun.dataset.planner  # noqa: F401

    before, started = peak(), time.monotonic()
    _, plan = plan_of(folder, order)
    seconds = time.monotonic() - started
    stored = len(plan.to_parquet())
    size = sum(sum(file.group_bytes) for file in plan.files)
    return {
        "seconds": seconds,
        "memory": peak() - before,
        "stored": stored,
        "partitions": len(plan.partitions),
        "reads": plan.bytes_read / size,
        "bytes": size,
    }


def peak() -> int:
    """Bytes of this process at most so far; what getrusage says includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def count(folder: Path, order: str | None, pages: int) -> dict[str, float]:
    """Prompt tokens: all, computed partition by partition, and different beginnings; seconds to read a partition."""
    settings, plan = plan_of(folder, order)
    tokens = Tokens()
    whole = computed = 0
    prompts: list[bytes] = []
    reading, apart = 0.0, 0
    for partition in plan.partitions:
        started = time.monotonic()
        batches = list(read(plan, settings, partition))
        reading += time.monotonic() - started
        own = [prompt for batch in batches for prompt in tokens.of(batch)]
        whole += sum(map(len, own))
        computed += computed_tokens(own, pages)
        sortable = [prompt.astype(">i4").tobytes() for prompt in own]
        apart += distinct_tokens(sortable)
        prompts += sortable
    return {
        "whole": whole,
        "once": tokens.once(whole),
        "computed": computed,
        "distinct": distinct_tokens(prompts),
        "apart": apart,
        "reading": reading / len(plan.partitions),
    }


def read(plan: Any, settings: Any, partition: Any) -> Iterator[pa.RecordBatch]:
    from batchrun.dataset.reader import read_partition

    order = partition.places if partition.order else None
    files = plan.files_of(partition)
    batches = read_partition(partition.slices, files, plan.schema, COLUMNS, None, {}, {}, order=order)
    return (batch.records for batch in batches)


class Tokens:
    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        self.known: dict[str, np.ndarray] = {}
        self.repeated = 0

    def once(self, whole: int) -> int:
        """Of the prompts' `whole` tokens, those of each document once and of all questions."""
        return whole - self.repeated

    def of(self, batch: pa.RecordBatch) -> list[np.ndarray]:
        documents = batch["document"].to_pylist()
        new = [text for text in dict.fromkeys(documents) if text not in self.known]
        if new:
            heads = self.tokenizer([f"Document: {text}\n" for text in new], add_special_tokens=False)
            self.known.update(zip(new, map(as_ids, heads["input_ids"]), strict=True))
        self.repeated += sum(len(self.known[text]) for text in documents)
        self.repeated -= sum(len(self.known[text]) for text in new)
        tails = self.tokenizer(
            [f"Question: {text}\nAnswer:" for text in batch["question"].to_pylist()], add_special_tokens=False
        )
        return [
            np.concatenate([self.known[document], as_ids(tail)])
            for document, tail in zip(documents, tails["input_ids"], strict=True)
        ]


def as_ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def computed_tokens(prompts: list[np.ndarray], pages: int) -> int:
    from batchrun.engine.paged.schedule.output_lengths import OutputLengths
    from batchrun.engine.paged.schedule.page_pool import PagePool
    from batchrun.engine.paged.schedule.scheduler import Scheduler
    from batchrun.engine.protocol import Request

    longest = max(map(len, prompts)) + NEW_TOKENS
    scheduler = Scheduler(PagePool(pages, 256), 2048, 16384, longest, OutputLengths(certain=True))
    rows, computed = iter(enumerate(prompts)), 0
    while True:
        while len(scheduler.queue) < WINDOW and (row := next(rows, None)) is not None:
            scheduler.add(Request(*row, NEW_TOKENS))
        scheduler.no_more_requests = len(scheduler.queue) < WINDOW
        while scheduler.should_prefill() and (chunks := scheduler.next_prefill()):
            computed += sum(chunk.stop - chunk.start for chunk in chunks)
            scheduler.prefill_launched()
        if scheduler.next_decode(8) is None and not scheduler.active and not len(scheduler.queue):
            return computed


def distinct_tokens(prompts: list[bytes]) -> int:
    """Tokens that have to be computed if no beginning is computed twice."""
    prompts.sort()
    found = len(prompts[0]) // 4
    for one, other in pairwise(prompts):
        size = min(len(one), len(other))
        a, b = np.frombuffer(one[:size], ">i4"), np.frombuffer(other[:size], ">i4")
        different = a != b
        same = int(different.argmax()) if different.any() else size // 4
        found += len(other) // 4 - same
    return found


def show(name: str, plan: dict[str, float], tokens: dict[str, float]) -> None:
    distinct = tokens["distinct"]
    print(
        f"{name}: {tokens['whole']:,} prompt tokens in {plan['partitions']} partitions. Each document once and all "
        f"questions are {tokens['once']:,}; told apart token by token {distinct:,}, and partition by partition "
        f"{tokens['apart']:,} ({tokens['apart'] / distinct:.3f} times)\n"
        f"    the engine computes {tokens['computed']:,}: {tokens['computed'] / tokens['once']:.3f} times the first "
        f"figure, {tokens['computed'] / distinct:.3f} times the second\n"
        f"    planned in {plan['seconds']:.1f} s with {plan['memory'] / 2**20:,.0f} MiB more; stored in "
        f"{plan['stored']:,} bytes; {plan['bytes'] / 2**20:,.0f} MiB of row groups read {plan['reads']:.1f} times, "
        f"{tokens['reading']:.2f} s a partition",
        flush=True,
    )


TOKENIZER = "jobs/quickstart/model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--length", type=int, default=2000, help="characters of a document")
    parser.add_argument("--pages", type=int, default=2000, help="of 256 tokens")
    parser.add_argument("--folder", type=Path, help="an empty one, kept; otherwise a temporary one")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
