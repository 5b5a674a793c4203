"""Completions and faults as rows of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.engine.protocol import Completion
from batchrun.errors import FaultCode, RowFault
from batchrun.output.chunk import ANSWERS
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.structured.answer_format import AnswerFormat


def answered(
    done: Sequence[Completion],
    lengths: NDArray[np.int32],
    detokenizer: Detokenizer,
    wanted: AnswerFormat | None = None,
) -> pa.Table:
    """Completions as answers; `lengths` are the prompts' tokens, by row. One that is not as `wanted` is a fault."""
    rows = np.fromiter((c.id for c in done), np.int64, len(done))
    decoded = detokenizer.decode([c.token_ids for c in done])
    faults = [c.fault for c in done]
    if wanted is not None:
        wrong = wanted.faults(decoded, [c.finish_reason == "stop" for c in done])
        faults = [
            fault or (None if what is None else RowFault(FaultCode.INVALID_OUTPUT, what))
            for fault, what in zip(faults, wrong, strict=True)
        ]
    texts = [None if fault else text for text, fault in zip(decoded, faults, strict=True)]
    return _table(
        rows=rows,
        answer=texts,
        finish_reason=[c.finish_reason for c in done],
        prompt_tokens=lengths[rows],
        output_tokens=np.fromiter((len(c.token_ids) for c in done), np.int32, len(done)),
        error=[None if fault is None else str(fault) for fault in faults],
    )


def failed(faults: Mapping[int, RowFault]) -> pa.Table:
    """Rows that no engine has seen, or whose answer is void."""
    return _table(
        rows=np.fromiter(faults, np.int64, len(faults)),
        answer=[None] * len(faults),
        finish_reason=["error"] * len(faults),
        prompt_tokens=np.zeros(len(faults), np.int32),
        output_tokens=np.zeros(len(faults), np.int32),
        error=[str(fault) for fault in faults.values()],
    )


def _table(
    rows: NDArray[np.int64],
    answer: list[str | None],
    finish_reason: list[str],
    prompt_tokens: NDArray[np.int32],
    output_tokens: NDArray[np.int32],
    error: Sequence[str | None],
) -> pa.Table:
    columns = {
        "row": rows,
        "answer": answer,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "status": ["ok" if e is None else "failed" for e in error],
        "error": error,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in ANSWERS], schema=ANSWERS)
