"""How close `batchrun plan --trial` comes: an estimate from a few seconds of trial, beside the whole job's own time.

    python -m tests.measure.estimate [--rows 8000] [--trial 5] [--batch-tokens 4096] [--clock cpu]

A random two-layer model with a byte tokenizer and the padded engine, in this process, on three distributions of
lengths. `--clock cpu` counts this process's CPU time in place of wall time, which others on the machine stretch.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import batchrun.estimate.trial as trial
from batchrun.dataset.rows import all_rows
from batchrun.driver.prepare import prepare
from batchrun.engine.choose import load_engine
from batchrun.engine.protocol import Request
from batchrun.estimate.cost import Throughput, estimate
from batchrun.estimate.sample import sample
from batchrun.job.job import Job
from tests.support.tiny_models import make_model

# name: prompt bytes (median, spread of the logarithm, most), max_new_tokens
DISTRIBUTIONS = {
    "short prompts, short answers": ((30, 0.3, 100), 16),
    "long skewed prompts": ((120, 0.9, 450), 32),
    "short prompts, long answers": ((20, 0.4, 60), 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--trial", type=float, default=5.0)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", choices=DISTRIBUTIONS, help="one of the distributions")
    args = parser.parse_args()
    if args.clock == "cpu":
        torch.set_num_threads(1)
        trial.time.monotonic = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("llama", Path(folder) / "model")
        for name, (prompt, new_tokens) in DISTRIBUTIONS.items():
            if args.only not in (None, name):
                continue
            job = write(Path(folder), model, args, prompt, new_tokens)
            print(f"{name}: {compare(job, args)}", flush=True)


def write(folder: Path, model: Path, args: argparse.Namespace, prompt: tuple, new_tokens: int) -> Job:
    rng = np.random.default_rng(1)
    median, spread, most = prompt
    lengths = np.clip(np.exp(rng.normal(math.log(median), spread, args.rows)), 4, most).astype(int)
    letters = rng.integers(97, 123, int(lengths.sum())).astype(np.uint8).tobytes().decode()
    ends = np.cumsum(lengths)
    texts = [letters[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    pq.write_table(pa.table({"text": texts}), folder / "in.parquet", row_group_size=1000)
    settings = {
        "input": {"path": str(folder / "in.parquet")},
        "prompt": {"column": "text"},
        "model": {"name": str(model)},
        "generation": {"max_new_tokens": new_tokens},
        "engine": {"kind": "padded", "batch_tokens": args.batch_tokens},
        "output": {"path": str(folder / "out")},
    }
    return Job.model_validate(settings)


def compare(job: Job, args: argparse.Namespace) -> str:
    prepared = prepare(job)
    engine = load_engine(prepared.codec.engine)
    sampled = sample(prepared, job.engine.window_rows)
    requests = [Request(i, p, job.generation.max_new_tokens, i) for i, p in enumerate(sampled.prompts)]
    seen = trial._batches(engine, requests, args.batch_tokens, args.trial)
    known = Throughput("trial", "padded", "cpu", seen, True)
    about = estimate(
        known,
        sampled.lengths,
        np.array(sampled.runs),
        prepared.plan.rows,
        job.generation.max_new_tokens,
        1,
        1,
    )
    builder = prepared.codec.builder
    prompts = [p for batch in all_rows(job, prepared.plan, builder.columns) for p in builder.build(batch)]
    whole = [Request(i, p, job.generation.max_new_tokens, i) for i, p in enumerate(prompts)]
    started = trial.time.monotonic()
    outputs = sum(len(completion.token_ids) for completion in engine.generate(iter(whole)))
    took = trial.time.monotonic() - started
    return (
        f"estimated {about.seconds.likely:.1f} s ({about.seconds.low:.1f} to {about.seconds.high:.1f}) from "
        f"{len(seen)} batches in {sum(o.seconds for o in seen):.1f} s, took {took:.1f} s: off by "
        f"{about.seconds.likely / took - 1:+.1%}; output tokens {about.output_tokens.likely:,.0f}, were {outputs:,}"
    )


if __name__ == "__main__":
    main()
