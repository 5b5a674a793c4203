"""What is scored in place of generating an answer: the text of a column, or choices, a job's or each row's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.engine.protocol import NO_TOKENS, Request, Scored, TokenIds
from batchrun.errors import FaultCode, InputError, ModelError, RowFault, nearest
from batchrun.prompt.columns import holds_text, holds_texts, null_prompt, values
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.special import MARK, Guarded
from batchrun.prompt.template import Guard

# Lists of choices that are remembered, with what is scored for them: most columns repeat a few.
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """What comes behind a prompt: for each of its requests more tokens, and what is scored; and the choices that these
    are, if they are any."""

    requests: tuple[tuple[TokenIds, Scored], ...]
    choices: ChoiceScoring | None = None

    @property
    def room(self) -> int:
        """Tokens of the context that a prompt has to leave."""
        return max(len(more) + 1 for more, _ in self.requests)


class Scoring(Protocol):
    """What a job scores. `columns` are those that it reads."""

    columns: list[str]

    def behind(self, batch: pa.RecordBatch) -> list[Behind | RowFault]:
        """(rows,) what is scored behind each row's prompt."""
        ...


def requests(
    token_ids: TokenIds, behind: Behind, row_seed: int, ids: Sequence[int], adapter: int = 0
) -> list[Request]:
    """Those of a row with this prompt and adapter; `ids` are one for each."""
    found = []
    for number, (more, scored) in zip(ids, behind.requests, strict=True):
        whole = np.concatenate([token_ids, more]) if len(more) else token_ids
        found.append(Request(number, whole, 1, row_seed, scored=scored, adapter=adapter))
    return found


class ColumnScoring:
    """The text of a column, in the tokens that the tokenizer writes it with, the ending token not included.

    Raises:
        InputError: there is no such column, or it holds no text.
    """

    def __init__(self, column: str, encoder: Encoder, schema: pa.Schema, guard: Guard) -> None:
        self.columns, self._column, self._encoder, self._guard = [column], column, encoder, guard
        if column not in schema.names:
            what = f"the input has no column {column!r}{nearest(column, schema.names)}"
            raise InputError(what, "answer.score", "name a column of the input")
        if not holds_text(kind := schema.field(column).type):
            raise InputError(f"column {column!r} is {kind}, not text", "answer.score", "use input.cast")

    def behind(self, batch: pa.RecordBatch) -> list[Behind | RowFault]:
        """See `Scoring`."""
        texts = [
            null_prompt(self._column) if value is None else value
            for value in map(self._guard, values(batch.column(self._column)))
        ]
        good = [
            Guarded.of(text) if MARK in text else text for text in texts if not isinstance(text, RowFault)
        ]
        encoded = iter(self._encoder.encode(good, special_tokens=False))
        return [text if isinstance(text, RowFault) else self._scored(next(encoded)) for text in texts]

    def _scored(self, tokens: TokenIds) -> Behind | RowFault:
        if not len(tokens):
            return RowFault(FaultCode.EMPTY_PROMPT, f"column {self._column!r} has no tokens to score")
        scored = Scored(tokens, np.arange(len(tokens) - 1, -1, -1, dtype=np.int32))
        return Behind(((tokens[:-1], scored),))


_END = -1


class ChoiceScoring:
    """The probability of each of a job's choices, from the prompt and the few tokens that choices have in common.

    A choice is the tokens that the tokenizer writes it with. Where choices part, the probabilities of the tokens that
    go on are divided by their sum, and where one choice ends and others go on, ending is one of the ways; a choice's
    probability is the product along its way. That is how often generation kept to these ways gives it at temperature
    1: they add up to 1, however many tokens each has, and tokens without an alternative change nothing. (Probabilities
    of whole choices, normalized, would favour those of few tokens, and ask more of the model.)

    Args:
        texts: the choices; `ends` are the tokens that end an answer.
        guard: what keeps a text from becoming special tokens.

    Raises:
        ModelError: the tokenizer does not write a choice as it reads, or two alike; or nothing ends an answer.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encoder: Encoder,
        detokenizer: Detokenizer,
        ends: Sequence[int],
        where: str,
        guard: Guard | None = None,
    ) -> None:
        spelled = texts if guard is None else [guard(text) for text in texts]
        guarded = [Guarded.of(text) if MARK in text else text for text in spelled]
        encoded = encoder.encode(guarded, special_tokens=False)
        for text, written in zip(texts, detokenizer.decode(encoded), strict=True):
            if text != written:
                fix = "leave out answer.probabilities, or change the choice"
                raise ModelError(f"its tokenizer writes the choice {text!r} as {written!r}", where, fix)
        ways = [tuple(tokens.tolist()) for tokens in encoded]
        if len(set(ways)) < len(ways):
            raise ModelError("its tokenizer writes two choices alike", where, "leave one of them out")
        if not ends and any(one == other[: len(one)] for one, other in pairwise(sorted(ways))):
            fix = "give the model's generation_config.json an eos_token_id"
            raise ModelError("no token ends an answer, and a choice begins another", where, fix)
        self.columns: list[str] = []
        self.texts = list(texts)
        self._ways = [(*way, _END) for way in ways]
        forks = self._forks()
        self.requests = Behind(self._requests(forks, list(ends)), self)

    def behind(self, batch: pa.RecordBatch) -> list[Behind | RowFault]:
        """See `Scoring`: the same for every row."""
        return [self.requests] * batch.num_rows

    def probabilities(self, logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
        """(rows, choices), each row adding up to 1; `logprobs` (rows, tokens) are what the requests scored, one request
        behind another."""
        total = np.zeros((len(logprobs), len(self._ways)))
        for fork, ways in self._columns.items():
            each = np.stack(
                [np.logaddexp.reduce(logprobs[:, one].astype(np.float64), axis=1) for one in ways.values()], 1
            )
            each -= np.logaddexp.reduce(each, axis=1, keepdims=True)
            for choice, way in enumerate(self._ways):
                if way[: len(fork)] == fork:
                    total[:, choice] += each[:, list(ways).index(way[len(fork)])]
        return np.exp(total)

    def _forks(self) -> dict[tuple[int, ...], list[int]]:
        """The tokens behind which choices part, and what may follow there. The start is among them in any case."""
        following: dict[tuple[int, ...], list[int]] = {}
        for way in self._ways:
            for place in range(len(way)):
                following.setdefault(way[:place], []).append(way[place])
        distinct = {start: list(dict.fromkeys(tokens)) for start, tokens in following.items()}
        return {start: tokens for start, tokens in distinct.items() if len(tokens) > 1 or not start}

    def _requests(
        self, forks: dict[tuple[int, ...], list[int]], ends: list[int]
    ) -> tuple[tuple[TokenIds, Scored], ...]:
        """As few as there are ways on which the last fork differs. `_columns` keeps where among all that is scored each
        fork's tokens are."""
        self._columns: dict[tuple[int, ...], dict[int, list[int]]] = {}
        made, column = [], 0
        for longest in sorted(forks, key=len, reverse=True):
            tokens: list[int] = []
            back: list[int] = []
            for fork in sorted(forks, key=len):
                if fork in self._columns or longest[: len(fork)] != fork:
                    continue
                places = self._columns[fork] = {}
                for token in forks[fork]:
                    wanted = ends if token == _END else [token]
                    places[token] = [*range(column, column + len(wanted))]
                    column += len(wanted)
                    tokens += wanted
                    back += [len(longest) - len(fork)] * len(wanted)
            if tokens:
                more = np.array(longest, np.int32) if longest else NO_TOKENS
                made.append((more, Scored(np.array(tokens, np.int32), np.array(back, np.int32))))
        return tuple(made)


class ColumnChoices:
    """The choices of a column, a list of texts in each row; `makes` gives what is scored for a list.

    Raises:
        InputError: there is no such column, or it holds no lists of texts.
    """

    def __init__(
        self, column: str, schema: pa.Schema, makes: Callable[[Sequence[str]], ChoiceScoring]
    ) -> None:
        self.columns, self._column, self._makes = [column], column, makes
        self._known: OrderedDict[tuple[Any, ...], Behind | RowFault] = OrderedDict()
        if column not in schema.names:
            what = f"the input has no column {column!r}{nearest(column, schema.names)}"
            raise InputError(what, "answer.choices", "name a column of the input")
        if not holds_texts(kind := schema.field(column).type):
            what = f"column {column!r} is {kind}, not lists of texts"
            raise InputError(what, "answer.choices", "use input.cast")

    def behind(self, batch: pa.RecordBatch) -> list[Behind | RowFault]:
        """See `Scoring`."""
        return [self._of(texts) for texts in values(batch.column(self._column))]

    def _of(self, texts: list[str | None] | RowFault | None) -> Behind | RowFault:
        if isinstance(texts, RowFault):
            return texts
        key = (None,) if texts is None else tuple(texts)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        self._known[key] = made = self._made(texts)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return made

    def _made(self, texts: list[str | None] | None) -> Behind | RowFault:
        if not texts:
            return self._fault("is null" if texts is None else "is an empty list")
        if not all(texts) or len({*texts}) < len(texts):
            return self._fault("has a text that is null, empty or there twice")
        try:
            return self._makes([text for text in texts if text]).requests
        except ModelError as error:
            return self._fault(f"is not scored: {error.what}")

    def _fault(self, why: str) -> RowFault:
        return RowFault(FaultCode.INVALID_SETTING, f"choices: column {self._column!r} {why}")
