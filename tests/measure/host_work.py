"""What the paged engine's host does for each decode step, while the device would compute: plan, upload, read back.

    python -m tests.measure.host_work [--rows 1024] [--new-tokens 256] [--steps 8] [--documents 40]

A tiny model whose device work is left out: every round gives back tokens at once, so that all time is the host's. It is
the thread's own time on a processor, which other work on the machine makes hardly longer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.cascade import CascadePlanner
from batchrun.engine.paged.device.runner import Pending
from batchrun.engine.paged.device.work import DecodeWork
from batchrun.engine.paged.schedule.scheduler import DecodeBatch, PrefillChunk
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights.loading import load_model
from tests.support.tiny_models import make_model

TOKEN = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--documents", type=int, default=0, help="that prompts begin with, of 200 tokens")
    parser.add_argument("--steps", type=int, default=8, help="decode steps in a round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(make_model("llama", Path(scratch)))
        for known in (True, False):
            print(f"{args.rows} rows, lengths {'known' if known else 'learned'}: ", end="", flush=True)
            print(f"{1000 * seconds_per_step(folder, args, known):.3f} ms of host work a decode step")


def seconds_per_step(folder: str, args: argparse.Namespace, known: bool) -> float:
    options: dict[str, object] = {
        "max_rows": args.rows, "decode_steps": args.steps, "cache_tokens": 2 * args.rows * (args.new_tokens + 512),
    }  # fmt: skip
    stops = () if known else (TOKEN + 1,)
    spec = EngineSpec(
        "paged", folder, folder, max_context=args.new_tokens + 256, stop_token_ids=stops, options=options
    )
    engine = PagedEngine(spec, load_model(spec))
    runner, steps, begun = engine._runner, 0, 0.0
    # As of a model whose keys are worth reading once, and of a GPU's blocks.
    planner = CascadePlanner(Layer(query_heads=16, kv_heads=8, head_dim=128, scale=1.0), (64, 128), 2)

    def prefill(chunks: list[PrefillChunk]) -> Pending:
        sequences = [chunk.sequence for chunk in chunks if chunk.complete]
        tokens = torch.full((1, len(sequences)), TOKEN, dtype=torch.int32)
        return Pending(sequences, tokens, runner._mark(), runner._mark())

    def decode(batch: DecodeBatch) -> Pending:
        nonlocal steps, begun
        begun = begun or time.thread_time()
        steps += batch.steps
        work = DecodeWork.of(batch, planner.plan(batch))
        runner._upload(runner._shape(work), work)
        tokens = torch.full((batch.steps, len(batch.sequences)), TOKEN, dtype=torch.int32)
        return Pending(batch.sequences, tokens, runner._mark(), runner._mark())

    runner.prefill, runner.decode = prefill, decode  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 200, 200) for _ in range(args.documents)]
    prompts = [
        rng.integers(3, 200, int(rng.integers(20, 250 if not documents else 50))) for _ in range(args.rows)
    ]
    if documents:
        prompts = [np.append(documents[i % len(documents)], one) for i, one in enumerate(prompts)]
    requests = [Request(i, one.astype(np.int32), args.new_tokens) for i, one in enumerate(prompts)]
    assert sum(len(c.token_ids) for c in engine.generate(iter(requests))) == args.rows * args.new_tokens
    return (time.thread_time() - begun) / steps


if __name__ == "__main__":
    main()
