"""Which share of the prompt tokens the paged engine need not compute, since prompts are the same or begin alike.

    python -m tests.measure.shared_prefixes FILE.parquet [--column description] [--pages 2000] [--new-tokens 32]

The engine's own scheduler and page pool over real prompts, without a model: every row runs to its last token. Rows
with the same prompt are left out, as a worker does.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from batchrun.engine.paged.schedule.output_lengths import OutputLengths
from batchrun.engine.paged.schedule.page_pool import PagePool
from batchrun.engine.paged.schedule.scheduler import Scheduler
from batchrun.engine.protocol import Request

LONGEST = 8000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--column", default="description")
    parser.add_argument("--tokenizer", default="jobs/quickstart/model")
    parser.add_argument(
        "--pages", type=int, default=2000, help="of 256 tokens; 2,000 of qwen3-0.6b take 59 GB"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--window", type=int, default=8192)
    args = parser.parse_args()
    texts = pq.read_table(args.file, columns=[args.column])[args.column].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    ids = tokenizer([f"Describe: {text}" for text in texts])["input_ids"]
    prompts = [np.array(one[:LONGEST], np.int32) for one in ids]
    distinct = {prompt.tobytes(): prompt for prompt in prompts}
    whole = sum(map(len, prompts))
    copied = whole - sum(map(len, distinct.values()))
    print(f"{len(prompts):,} rows, {whole:,} prompt tokens; {len(prompts) - len(distinct):,} rows are copied, "
          f"{copied / whole:.1%} of the tokens")  # fmt: skip
    started = time.process_time()
    shared, packs = run(list(distinct.values()), args)
    seconds = time.process_time() - started
    print(f"{shared / whole:.1%} of the tokens are shared, {(copied + shared) / whole:.1%} shared or copied; "
          f"{len(packs):,} prefills of {np.mean(packs):,.0f} tokens; {seconds:.1f} s of host work")  # fmt: skip


def run(prompts: list[np.ndarray], args: argparse.Namespace) -> tuple[int, list[int]]:
    """The shared tokens, and the tokens of each prefill."""
    scheduler = Scheduler(
        PagePool(args.pages, 256), 2048, 16384, LONGEST + args.new_tokens, OutputLengths(certain=True)
    )
    rows, packs = iter(enumerate(prompts)), []
    while True:
        while len(scheduler.queue) < args.window and (row := next(rows, None)) is not None:
            scheduler.add(Request(*row, args.new_tokens))
        scheduler.no_more_requests = len(scheduler.queue) < args.window
        while scheduler.should_prefill() and (chunks := scheduler.next_prefill()):
            packs.append(sum(chunk.stop - chunk.start for chunk in chunks))
            scheduler.prefill_launched()
        if scheduler.next_decode(8) is None and not scheduler.active and not len(scheduler.queue):
            return scheduler.shared_tokens, packs


if __name__ == "__main__":
    main()
