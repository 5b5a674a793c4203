"""How much right answers surprise the model of jobs/evaluate.yaml: `python jobs/evaluate.py jobs/answers/evaluate`."""

from __future__ import annotations

import sys
from collections import defaultdict
from math import exp
from pathlib import Path

import pyarrow.parquet as pq


def perplexities(output: Path) -> dict[str, float]:
    """By topic, and of all questions together, the perplexity of the right answers' tokens: 1 is no surprise at all."""
    table = pq.read_table(output / "data", columns=["topic", "truth_logprob", "truth_tokens"])
    logprobs: defaultdict[str, float] = defaultdict(float)
    tokens: defaultdict[str, int] = defaultdict(int)
    for row in table.to_pylist():
        for topic in (row["topic"], "all"):
            logprobs[topic] += row["truth_logprob"]
            tokens[topic] += row["truth_tokens"]
    return {topic: exp(-logprobs[topic] / tokens[topic]) for topic in logprobs}


if __name__ == "__main__":
    for topic, perplexity in sorted(
        perplexities(Path(sys.argv[1])).items(), key=lambda item: item[0] == "all"
    ):
        print(f"{topic:12} {perplexity:12,.1f}")
