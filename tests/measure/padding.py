"""What sorting by length is worth: wall time and padding efficiency, sorted against arrival order.

    python -m tests.measure.padding MODEL_FOLDER DATA.parquet COLUMN [--rows 2000] [--new-tokens 16]

Both see the same rows, the same budget of padded tokens, the same rules for cutting a batch and the same
loaded model, in alternation; the best of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyarrow.parquet as pq
import transformers

from batchrun.engine.padded.batching import by_length
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.protocol import EngineSpec, EngineStats, Request

ORDERS = {"sorted by length": by_length, "arrival order": list}


def main() -> None:
    args = parse_arguments()
    requests = read_requests(args)
    options = {"window_rows": len(requests)}
    if args.batch_tokens:
        options["batch_tokens"] = args.batch_tokens
    spec = EngineSpec("padded", args.model, args.model, device=args.device, options=options)
    engine = PaddedEngine.load(spec)
    lengths = np.array([len(request.token_ids) for request in requests])
    print(
        f"{len(requests)} rows, prompt tokens median {np.median(lengths):.0f}, largest {lengths.max()}, "
        f"{args.new_tokens} new tokens, {engine.budget} padded tokens a batch, "
        f"{engine.stats.attention} {engine.stats.dtype} on {engine.stats.device}"
    )
    best: dict[str, tuple[float, EngineStats]] = {}
    for _ in range(args.repeats):
        for name, order in ORDERS.items():
            seconds, stats = measure(PaddedEngine(spec, engine.model, order), requests)
            if name not in best or seconds < best[name][0]:
                best[name] = seconds, stats
    print(f"{'':18}{'seconds':>9}{'rows/s':>9}{'real tokens/s':>15}{'batches':>9}{'padding efficiency':>20}")
    for name, (seconds, stats) in best.items():
        real = (stats.prompt_tokens + stats.output_tokens) / seconds
        rate = len(requests) / seconds
        efficiency = stats.padding_efficiency
        print(f"{name:18}{seconds:9.2f}{rate:9.1f}{real:15.0f}{stats.batches:9}{efficiency:20.3f}")


def measure(engine: PaddedEngine, requests: list[Request]) -> tuple[float, EngineStats]:
    started = time.perf_counter()
    answered = sum(1 for _ in engine.generate(iter(requests)))
    seconds = time.perf_counter() - started
    assert answered == len(requests)
    return seconds, engine.stats


def read_requests(args: argparse.Namespace) -> list[Request]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    texts = pq.read_table(args.data, columns=[args.column])[args.column].slice(0, args.rows).to_pylist()
    encoded = tokenizer([text for text in texts if text], truncation=True, max_length=args.max_prompt)[
        "input_ids"
    ]
    return [Request(i, np.array(ids, np.int32), args.new_tokens) for i, ids in enumerate(encoded)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with model and tokenizer")
    parser.add_argument("data", help="a Parquet file")
    parser.add_argument("column", help="its text column")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--max-prompt", type=int, default=2048, help="longer prompts are cut")
    parser.add_argument("--batch-tokens", type=int, help="the engine's own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
