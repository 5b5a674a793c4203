"""Completions and faults as rows of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.engine.protocol import Completion
from batchrun.errors import RowFault
from batchrun.output.chunk import answers_schema
from batchrun.prompt.codec import PromptCodec


def answered(
    done: Sequence[Completion],
    lengths: NDArray[np.int32],
    codec: PromptCodec,
    reasoning: NDArray[np.bool_],
) -> pa.Table:
    """Completions as answers; `lengths` are the prompts' tokens, and `reasoning` tells whose model is thinking already
    where its prompt ends, both by row."""
    rows = np.fromiter((c.id for c in done), np.int64, len(done))
    more: dict[str, list[Any]] = {}
    texts: list[str | None]
    if codec.reasoning is None:
        texts = list(codec.detokenizer.decode([c.token_ids for c in done]))
    else:
        parts = [codec.reasoning.take_apart(c.token_ids, bool(reasoning[c.id])) for c in done]
        texts = [one.answer for one in parts]
        good = [completion.fault is None for completion in done]
        more["reasoning"] = [one.reasoning if ok else None for one, ok in zip(parts, good, strict=True)]
        more["reasoning_tokens"] = [one.tokens if ok else None for one, ok in zip(parts, good, strict=True)]
    for i, completion in enumerate(done):
        if completion.fault is not None:
            texts[i] = None
    return _table(
        rows=rows,
        answer=texts,
        finish_reason=[c.finish_reason for c in done],
        prompt_tokens=lengths[rows],
        output_tokens=np.fromiter((len(c.token_ids) for c in done), np.int32, len(done)),
        error=[None if c.fault is None else str(c.fault) for c in done],
        **more,
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
    **more: list[Any],
) -> pa.Table:
    columns = {
        "row": rows,
        "answer": answer,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "status": ["ok" if e is None else "failed" for e in error],
        "error": error,
        **more,
    }
    schema = answers_schema(more)
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
