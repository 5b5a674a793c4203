"""What is counted of rows, declared once: attempts count, everything else adds up, keeps and shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Failed rows that are named.
EXAMPLES = 5


@dataclass
class Counters:
    """Sums over generated rows; two of them add up with `+`.

    `rows` were generated or copied, `failed` of them without an answer, `empty` with an answer of no text; finish
    reasons and error codes are theirs. `copied` of them have the answer of another row with the same prompt; the
    `copied_tokens` of their prompts and answers are not among the other tokens, which engines have worked for. Of rows
    with several samples each sample has its finish reason, and may be `empty`; rows are always the input's, and one
    fails with the first of its samples that fails. `reused` rows had been staged by earlier attempts. Of the `pulled`
    rows, which were read and made prompts of, `requests` went to engines, with `more_samples` besides the first ones,
    and `sent_tokens` tokens of prompts in all. Where rows have limits of new tokens of their own, `sent_limits` are
    those of rows sent, `limits` those of rows generated. `handed_over` rows were left to another worker's attempt.
    `commits` parts were built and put in `commit_seconds`. `examples` names a few failed rows.
    """

    rows: int = 0
    failed: int = 0
    empty: int = 0
    reused: int = 0
    pulled: int = 0
    requests: int = 0
    sent_tokens: int = 0
    sent_limits: int = 0
    more_samples: int = 0
    limits: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    copied: int = 0
    copied_tokens: int = 0
    handed_over: int = 0
    commits: int = 0
    commit_seconds: float = 0.0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of prompts and answers, without those of copied rows."""
        return self.prompt_tokens + self.output_tokens

    def __add__(self, other: Counters) -> Counters:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return Counters(
            **sums,
            finish_reasons=added(self.finish_reasons, other.finish_reasons),
            errors=added(self.errors, other.errors),
            examples=(*self.examples, *other.examples)[:EXAMPLES],
        )

    def count(
        self,
        answers: pa.Table,
        name_of: Callable[[int], str],
        are_copies: bool = False,
        rows_of_row: int = 1,
    ) -> None:
        """Takes in new rows of a partition, schema ANSWERS, so many of the output for each of the input (those of one
        behind each other, all that are to come); `name_of` gives them names for people.

        Dicts are replaced, never changed: a heartbeat reads the old ones meanwhile.
        """
        rows = first_of_rows(answers, rows_of_row)
        failed = first_of_rows(answers.filter(answers["error"].is_valid()), rows_of_row)
        self.rows += rows.num_rows
        self.failed += failed.num_rows
        self.empty += empty_answers(answers)
        prompt = pc.sum(rows["prompt_tokens"], min_count=0).as_py()
        output = pc.sum(one_by_one(answers["output_tokens"]), min_count=0).as_py()
        if are_copies:
            self.copied += rows.num_rows
            self.copied_tokens += prompt + output
        else:
            self.prompt_tokens += prompt
            self.output_tokens += output
        self.finish_reasons = added(self.finish_reasons, value_counts(one_by_one(answers["finish_reason"])))
        if failed.num_rows:
            codes = Counter(error.partition(":")[0] for error in failed["error"].to_pylist())
            self.errors = added(self.errors, codes)
        some = failed.slice(0, EXAMPLES - len(self.examples))
        self.examples += tuple(
            f"{name_of(row)}: {error}"
            for row, error in zip(some["row"].to_pylist(), some["error"].to_pylist(), strict=True)
        )


def first_of_rows(answers: pa.Table, rows_of_row: int) -> pa.Table:
    """Of the rows of the output that a row of the input has, so many at most, the first one that is there."""
    if rows_of_row == 1:
        return answers
    _, first = np.unique(answers["row"].to_numpy() // rows_of_row, return_index=True)
    return answers.take(first)


SUMS = tuple(f.name for f in fields(Counters) if f.type in ("int", "float"))
"""The plain numbers among the counters."""


def added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Counts by name, summed."""
    return dict(Counter(one) + Counter(other))


def value_counts(values: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs."""
    return {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()}


def one_by_one(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of rows' samples one after another; a column without lists as it is."""
    return pc.list_flatten(column) if pa.types.is_list(column.type) else column


def empty_answers(answers: pa.Table) -> int:
    """Answers of rows that did not fail that are nothing but white space, or none, cut while the model thought."""
    texts = one_by_one(answers.filter(pc.equal(answers["status"], "ok"))["answer"])
    answered = pc.fill_null(texts, "")
    empty: int = pc.sum(pc.equal(pc.utf8_trim_whitespace(answered), ""), min_count=0).as_py()
    return empty
