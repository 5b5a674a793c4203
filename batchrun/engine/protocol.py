"""What every engine is: requests in, completions out, in any order.

An engine knows token ids and a model folder; it knows no files, no Parquet and no Dask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import RowFault

TokenIds = NDArray[np.int32]
NO_TOKENS: TokenIds = np.empty(0, np.int32)

TokenValues = dict[str, NDArray[Any]]
"""What comes beside tokens, such as their log probabilities: by name, arrays of a value or a row for each token."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What a row has in place of the same of `Sampling`."""

    temperature: float
    top_p: float
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Tokens whose log probabilities are wanted in place of an answer.

    `token_ids` (tokens,) int32: any of the vocabulary, one or several for a place. `back` (tokens,) int32, never
    rising: each is meant to stand behind the request's own tokens but for so many of the last ones, 0 behind all.
    """

    token_ids: TokenIds
    back: NDArray[np.int32]

    @property
    def states(self) -> int:
        """How many of the request's last tokens the model has to be run on for it: those of others may be shared."""
        return int(self.back[0]) + 1


@dataclass(slots=True)
class Request:
    """A row as token ids.

    `id` is unique among the requests in flight and comes back in the completion. `row_seed` is the row's own
    64-bit number, the same in every run: with the job's seed and the position it decides the sampling noise.
    `token_ids` (prompt length,) is never empty, and `len(token_ids) + max_new_tokens` fits the model's context.
    `generated` (fewer than max_new_tokens,) are the first tokens of the answer, from an earlier attempt: an engine
    goes on behind them, as if it had generated them itself, or starts over where its model cannot; `values` are
    theirs.
    `sampling` is the row's own, None where it is the job's. It may differ in what `Sampling.by_row` names.
    Of rows that wait, those of the lowest `stream` go first: it ends while later ones keep the engine busy.
    Once `cancelled` is set the engine lets go of the row within a second or so: `so_far` completes it.
    An engine may set `waiting` while it has not begun with a row that it has pulled: as long as it does, the row can be
    recalled for another engine.
    `adapter` is the row's among `EngineSpec.adapters`, counted from 1; 0 is none.
    `answer_state` is where its answer begins in the tables that answers are kept to, None at their `start`.
    With `scored` nothing is generated, and `max_new_tokens` is 1: the completion has the scored tokens, their log
    probabilities as the values "logprobs", and ends with "stop".
    """

    id: int
    token_ids: TokenIds
    max_new_tokens: int
    row_seed: int = 0
    generated: TokenIds = field(default_factory=lambda: NO_TOKENS)
    cancelled: bool = False
    waiting: bool = False
    stream: int = 0
    values: TokenValues = field(default_factory=dict)
    sampling: RowSampling | None = None
    scored: Scored | None = None
    answer_state: int | None = None
    adapter: int = 0

    @property
    def start(self) -> TokenIds:
        """What the model reads before it generates: prompt and what is generated already."""
        return np.concatenate([self.token_ids, self.generated]) if len(self.generated) else self.token_ids

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.generated)

    def so_far(self, generated: TokenIds | None = None, values: TokenValues | None = None) -> Completion:
        """The completion of a cancelled request: its tokens up to now, with their values."""
        if generated is None:
            generated, values = self.generated, self.values
        return Completion(self.id, generated, "cancelled", values=values or {})


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request became.

    `token_ids` (output length,) holds every generated token, the ending stop token included. `finish_reason` is
    "stop" (a stop token or a stop string), "length" (`max_new_tokens` were generated), "error" (see `fault`) or
    "cancelled": not an answer, but the tokens up to where the engine let go of it.
    A stop string ends generation at the token that completes it; the text is cut where it is decoded.
    `values` are the tokens' own, if the sampling asks for any: see `batchrun.engine.tokens.token_values`.
    """

    id: int
    token_ids: TokenIds
    finish_reason: str
    fault: RowFault | None = None
    values: TokenValues = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen, in transformers' own words; `temperature` 0 is greedy.

    `logprobs`: log probabilities are wanted, of the chosen tokens and of so many likeliest ones.
    `by_row` names what rows may have of their own, fields of `RowSampling`: see `Request.sampling`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    by_row: tuple[str, ...] = ()

    def of(self, request: Request) -> RowSampling:
        """The row's own, or the same of this."""
        return request.sampling or RowSampling(self.temperature, self.top_p, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class TokenTables:
    """Which tokens an answer may have: an automaton over tokens.

    Tokens that lead to the same states from everywhere share a class: `token_class` (tokens,) int32. `next_state`
    (states, classes), int16 or int32, is where a state's tokens lead; 0 is "not allowed". State 1 is that of an answer
    that has ended, `start` that of one without a token; answers may also begin at `thinking` or `answering`, see
    `Request.answer_state`. `digest` names the tables, since arrays are not compared.
    `only` (states,) int32 is the next token where just one text can follow, the end included, and -1 elsewhere: a row
    that comes there is complete without the model.
    """

    token_class: NDArray[np.int32]
    next_state: NDArray[np.int16 | np.int32]
    start: int
    digest: str
    only: NDArray[np.int32] | None = None
    thinking: int | None = None
    answering: int | None = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine is built from; small and picklable, since it crosses into the engine's own process.

    `model_path` is a local folder in transformers' layout, `tokenizer_path` likewise (used for stop strings and
    the padding token alone). `stop_token_ids` end a row; empty means that only the length does. `max_context` is
    the largest prompt + new tokens of any request. `options` holds the budgets that only one kind of engine reads.
    `answers` are the tables that every answer keeps to, stop tokens included; None leaves answers free.
    `quantization` is what the weights are converted to, "fp8" or None; `cache_dtype` what keys and values are kept in,
    "fp8", or "auto" for the model's own. `adapter` is the folder of a LoRA adapter, as PEFT saves it, that is merged
    into the weights; `adapters` are those of adapters that requests name. `gpus` is the tensor parallel size: rank i
    has the i-th device that CUDA_VISIBLE_DEVICES shows the engine's process, or is a process on the CPU.
    """

    kind: str
    model_path: str
    tokenizer_path: str
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    sampling: Sampling = Sampling()
    stop_token_ids: tuple[int, ...] = ()
    max_context: int = 4096
    options: dict[str, object] = field(default_factory=dict)
    answers: TokenTables | None = None
    quantization: str | None = None
    adapter: str | None = None
    adapters: tuple[str, ...] = ()
    gpus: int = 1
    cache_dtype: str = "auto"


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was loaded; sums, so that several engines add up.

    `computed_tokens` counts token positions that the model was run on, padding included; `prompt_tokens` and
    `output_tokens` the real ones among them. `shared_tokens` are those of prompts that it was not run on, since another
    row's prompt begins alike. `steps` grows while the model works, also inside of a long batch.
    `busy_seconds` is time spent in the model. `stage` is "loading" or "compiling" until it is loaded. `notes` are the
    lines for a person: which attention, why not paged, a batch that was halved. `times` are moments, in seconds since
    the epoch: "engine started", "engine imported", "engine ready", "first row" and "last row".
    """

    engine: str = ""
    attention: str = ""
    device: str = ""
    dtype: str = ""
    requests: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    shared_tokens: int = 0
    computed_tokens: int = 0
    batches: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    load_seconds: float = 0.0
    pid: int = 0
    stage: str = "loading"
    gauges: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    def since(self, earlier: EngineStats) -> EngineStats:
        """What the same engine has counted since then."""
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in SUMS})

    def is_before(self, other: EngineStats) -> bool:
        """Whether this is an earlier look at the same engine: no counter ever falls."""
        return any(getattr(self, name) < getattr(other, name) for name in SUMS)

    @property
    def padding_efficiency(self) -> float:
        """Real tokens / computed tokens, 1.0 before anything was computed."""
        return (
            (self.prompt_tokens + self.output_tokens) / self.computed_tokens if self.computed_tokens else 1.0
        )


SUMS = tuple(
    field.name for field in fields(EngineStats) if field.type in ("int", "float") and field.name != "pid"
)
"""The counters among an engine's stats."""


class Engine(Protocol):
    """Loaded once, used for as long as its process lives."""

    stats: EngineStats

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        """Loads the weights onto `spec.device`.

        Raises:
            ModelError: the model cannot be loaded or cannot do what the job asks; final.
        """
        ...

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """Pulls requests while there is room and yields a completion for each exactly once, in any order.

        `requests` yields None when nothing is waiting right now: go on with what is in hand and ask again later.
        (An iterator that knows nothing to be in hand blocks instead of yielding None, so asking is never a busy
        loop.) It ends when no more will come; the generator returns once all completions are out.
        """
        ...
