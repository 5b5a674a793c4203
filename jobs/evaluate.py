"""Counts how many answers of jobs/evaluate.yaml are right: `python jobs/evaluate.py jobs/answers/evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq


def normal(text: str | None) -> str:
    """Case, spaces and a full stop at the end make no answer wrong."""
    return (text or "").strip().rstrip(".").casefold()


def score(output: Path) -> dict[str, tuple[int, int]]:
    """Topic: (right answers, questions), over a complete output folder."""
    table = pq.read_table(output / "data", columns=["topic", "truth", "answer"])
    counts: dict[str, tuple[int, int]] = {}
    for row in table.to_pylist():
        right, asked = counts.get(row["topic"], (0, 0))
        counts[row["topic"]] = (right + (normal(row["answer"]) == normal(row["truth"])), asked + 1)
    return counts


if __name__ == "__main__":
    counts = score(Path(sys.argv[1]))
    for topic, (right, asked) in sorted(counts.items()):
        print(f"{topic:12} {right:3} of {asked:3}")
    print(f"{'all':12} {sum(r for r, _ in counts.values()):3} of {sum(n for _, n in counts.values()):3}")
