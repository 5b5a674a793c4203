"""Completions and faults as rows of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.engine.protocol import Completion, TokenValues
from batchrun.errors import FaultCode, RowFault
from batchrun.output.chunk import ANSWERS, ASKED
from batchrun.output.samples import merged
from batchrun.prompt.codec import PromptCodec
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.scoring import ChoiceScoring

THINKING = "the model was cut while it was thinking"


def answered(
    done: Sequence[Completion],
    lengths: NDArray[np.int32],
    codec: PromptCodec,
    reasoning: NDArray[np.bool_],
    stops: Sequence[Sequence[str] | None] | None = None,
    samples: int = 1,
    rows_of_row: int = 1,
    choices: Sequence[ChoiceScoring | None] = (),
) -> pa.Table:
    """Completions as answers; `lengths` are the prompts' tokens, and `reasoning` tells whose model is thinking already
    where its prompt ends, both by row. Each row has `samples` completions, one after another, which become one row of
    the output or, where `rows_of_row` is as many, a row each; `stops` are their own stop texts, where they have some,
    and `choices` what those of scored rows are.
    An answer that is not as the job wants it is a fault."""
    rows = np.fromiter((c.id for c in done), np.int64, len(done)) // samples
    decoded: list[str | None]
    if codec.builder.is_scored:
        decoded, asked = _chosen(done, choices) if choices else _scored(done)
    else:
        decoded, asked = _decoded(done, codec, reasoning[rows], stops)
    faults = [c.fault for c in done]
    if codec.answers is not None and not codec.builder.is_scored:
        asked["raw"] = [None if fault else text for text, fault in zip(decoded, faults, strict=True)]
        wrong = codec.answers.faults(
            [text or "" for text in decoded], [c.finish_reason == "stop" for c in done]
        )
        faults = [
            fault
            or (
                None
                if what is None
                else RowFault(FaultCode.INVALID_OUTPUT, THINKING if text is None else what)
            )
            for fault, what, text in zip(faults, wrong, decoded, strict=True)
        ]
    texts = [None if fault else text for text, fault in zip(decoded, faults, strict=True)]
    table = _table(
        rows=rows if rows_of_row == 1 else np.fromiter((c.id for c in done), np.int64, len(done)),
        answer=texts,
        finish_reason=[c.finish_reason for c in done],
        prompt_tokens=lengths[rows],
        output_tokens=np.fromiter((len(c.token_ids) for c in done), np.int32, len(done)),
        error=[None if fault is None else str(fault) for fault in faults],
    )
    for name, column in asked.items():
        table = table.append_column(ASKED.field(name), pa.array(column, ASKED.field(name).type))
    return merged(table, samples // rows_of_row)


def _decoded(
    done: Sequence[Completion],
    codec: PromptCodec,
    reasoning: NDArray[np.bool_],
    stops: Sequence[Sequence[str] | None] | None,
) -> tuple[list[str | None], dict[str, list[Any]]]:
    """The texts of generated answers, and the columns beside them; `reasoning` and `stops` by completion."""
    asked = _asked(done, codec.detokenizer)
    if codec.reasoning is None:
        return list(codec.detokenizer.decode([c.token_ids for c in done], stops)), asked
    parts = [
        codec.reasoning.take_apart(c.token_ids, begun, stop)
        for c, begun, stop in zip(done, reasoning.tolist(), stops or [None] * len(done), strict=True)
    ]
    good = [completion.fault is None for completion in done]
    asked["reasoning"] = [one.reasoning if ok else None for one, ok in zip(parts, good, strict=True)]
    asked["reasoning_tokens"] = [one.tokens if ok else None for one, ok in zip(parts, good, strict=True)]
    return [one.answer for one in parts], asked


def _scored(done: Sequence[Completion]) -> tuple[list[str | None], dict[str, list[Any]]]:
    """The answers that log probabilities of texts make, and the columns beside them."""
    logprobs = _logprobs(done)
    totals = [None if one is None else one.sum() for one in logprobs]
    means = [None if one is None else one.mean() for one in logprobs]
    asked: dict[str, list[Any]] = {
        "mean_logprob": means,
        "perplexity": [None if mean is None else np.exp(-mean) for mean in means],
        "scored_tokens": [None if one is None else len(one) for one in logprobs],
    }
    return [None if total is None else repr(float(total)) for total in totals], asked


def _chosen(
    done: Sequence[Completion], choices: Sequence[ChoiceScoring | None]
) -> tuple[list[str | None], dict[str, list[Any]]]:
    """The likeliest of each row's choices, and the probabilities of all."""
    alike: dict[ChoiceScoring, list[int]] = {}
    logprobs = _logprobs(done)
    for i, own in enumerate(choices):
        if own is not None and logprobs[i] is not None:
            alike.setdefault(own, []).append(i)
    labels: list[str | None] = [None] * len(done)
    probabilities: list[NDArray[np.float64] | None] = [None] * len(done)
    for own, rows in alike.items():
        found = own.probabilities(np.stack([one for i in rows if (one := logprobs[i]) is not None]))
        for i, each in zip(rows, found, strict=True):
            labels[i], probabilities[i] = own.texts[int(each.argmax())], each
    return labels, {"probabilities": probabilities}


def _logprobs(done: Sequence[Completion]) -> list[NDArray[np.float64] | None]:
    return [one.values["logprobs"].astype(np.float64) if one.fault is None else None for one in done]


def _asked(done: Sequence[Completion], detokenizer: Detokenizer) -> dict[str, list[Any]]:
    """The columns that the engine gave values for; rows without an answer have none."""
    given = [c.values if c.fault is None else {} for c in done]
    names = {name for values in given for name in values}
    columns: dict[str, list[Any]] = {}
    if "logprobs" in names:
        logprobs = [values.get("logprobs") for values in given]
        columns["logprobs"] = logprobs
        columns["mean_logprob"] = [None if one is None or not len(one) else one.mean() for one in logprobs]
    if "top_tokens" in names:
        ids = np.unique(np.concatenate([v["top_tokens"].ravel() for v in given if v])).tolist()
        texts = dict(zip(ids, detokenizer.tokens(ids), strict=True))
        columns["top_logprobs"] = [_likeliest(values, texts) if values else None for values in given]
    return columns


def _likeliest(values: TokenValues, texts: Mapping[int, str]) -> list[list[dict[str, Any]]]:
    """For each token of an answer, the likeliest ones in its place."""
    return [
        [
            {"token_id": token, "token": texts[token], "logprob": logprob}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        for tokens, logprobs in zip(
            values["top_tokens"].tolist(), values["top_logprobs"].tolist(), strict=True
        )
    ]


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
