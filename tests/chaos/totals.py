"""What the outputs of one call of the harness came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Totals:
    """`twice` are requests for rows that had to be generated again, of `allowed` that the strikes explain."""

    outputs: int = 0
    rows: int = 0
    runs: int = 0
    requests: int = 0
    twice: int = 0
    allowed: int = 0
    continued: int = 0
    stops: list[float] = field(default_factory=list)
    slowest_exit: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    before_hooks: int = 0
