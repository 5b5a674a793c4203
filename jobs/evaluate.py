"""Counts how many answers of jobs/evaluate.yaml are right: `python jobs/evaluate.py jobs/answers/evaluate`."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq


def normal(text: str | None) -> str:
    """Case, spaces and a full stop at the end make no answer wrong."""
    return (text or "").strip().rstrip(".").casefold()


def majority(answers: list[str]) -> str:
    """The most frequent answer, the first one of several such (self-consistency: Wang et al., 2022)."""
    return Counter(answers).most_common(1)[0][0]


@dataclass
class Score:
    """Of a topic: questions, the share of right answers added up over them, and how often the majority was right."""

    asked: int = 0
    right: float = 0.0
    agreed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.right / self.asked:6.1%} of the answers right, {self.agreed} of {self.asked} by majority"
        )


def score(output: Path) -> dict[str, Score]:
    """By topic, over a complete output folder, whose rows have a list of answers or, without samples, one."""
    table = pq.read_table(output / "data", columns=["topic", "truth", "answer"])
    scores: dict[str, Score] = {}
    for row in table.to_pylist():
        given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        answers, truth = [normal(one) for one in given], normal(row["truth"])
        one = scores.setdefault(row["topic"], Score())
        one.asked += 1
        one.right += answers.count(truth) / len(answers)
        one.agreed += majority(answers) == truth
    return scores


if __name__ == "__main__":
    scores = score(Path(sys.argv[1]))
    for topic, one in sorted(scores.items()):
        print(f"{topic:12} {one}")
    whole = [
        sum(values) for values in zip(*((s.asked, s.right, s.agreed) for s in scores.values()), strict=True)
    ]
    print(f"{'all':12} {Score(*whole)}")
