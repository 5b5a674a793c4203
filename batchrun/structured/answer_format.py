"""What a job wants its answers to be, from the texts that they may be to the column that they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from batchrun.errors import JobError
from batchrun.structured.arrow import Kind, from_values, kind_of, to_array, to_texts
from batchrun.structured.automaton import MAX_STATES, Automaton, TooLarge, build, either, literal
from batchrun.structured.document import document
from batchrun.structured.nodes import Node, is_never
from batchrun.structured.regex import NotRegular, pattern
from batchrun.structured.schema import no_value, read_schema

# Of a recursive schema: how deep documents may nest, and how large that may make the automaton.
MAX_LEVELS, MAX_LEVEL_STATES = 8, 6000


@dataclass(frozen=True)
class AnswerFormat:
    """Answers that are documents of a schema (`node`), or plain texts (`node` None).

    `kind` is what their column holds. With `probabilities`, those of its texts are a column beside it, those of texts
    that each row has of its own as lists. Documents of a recursive schema nest at most `levels` deep. The
    automaton of a document has `max_states` at most.
    """

    node: Node | None
    kind: Kind
    expression: str | None = None
    probabilities: bool = False
    levels: int | None = None
    max_states: int = MAX_STATES

    @cached_property
    def automaton(self) -> Automaton:
        """That of the answers' bytes.

        Raises:
            JobError: it is too large, or no text is an answer.
        """
        if self.node is not None:
            return document(self.node, self.max_states)
        if self.expression is None:
            return build(either(*(literal(text.encode()) for text in self.kind.texts)))
        return _regex(self.expression)

    @property
    def type(self) -> pa.DataType:
        """The Arrow type of the answers' column."""
        return self.kind.type

    def typed(self, field: pa.Field) -> pa.Field:
        """An output column's field as parts have it; of answers in lists, one for each sample, lists."""
        if field.name == "probabilities" and self.kind.texts:
            return field.with_type(pa.struct([(text, pa.float64()) for text in self.kind.texts]))
        if field.name != "answer":
            return field
        return field.with_type(pa.list_(self.type) if pa.types.is_list(field.type) else self.type)

    def column(self, name: str, staged: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """An output column as parts have it, from how chunks have it."""
        if name == "probabilities" and self.kind.texts:
            return _to_struct(staged, self.kind.texts)
        return self.values(staged.to_pylist()) if name == "answer" else staged

    def staged(self, name: str, column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """The other way round."""
        if name == "probabilities" and self.kind.texts:
            return _to_lists(column)
        return pa.array(self.texts(column), pa.large_string()) if name == "answer" else column

    def faults(self, texts: Sequence[str], whole: Sequence[bool]) -> list[str | None]:
        """For each answer what is wrong with it, None where it is valid.

        `whole` says which ones ended by themselves; one that was cut is valid where nothing could follow.
        """
        states = self.automaton.run([text.encode() for text in texts])
        accepted = self.automaton.accepting[states]
        complete = accepted & (np.array(whole, bool) | self.automaton.closed[states])
        faults: list[str | None] = [None] * len(texts)
        for i in np.flatnonzero(~complete).tolist():
            cut = not whole[i]
            faults[i] = "the answer was cut before its end" if cut else "the answer is not of the wanted form"
        valid = np.flatnonzero(complete).tolist()
        if self._fault_of_values([texts[i] for i in valid]):
            for i in valid:
                faults[i] = self._fault_of_values([texts[i]])
        return faults

    def values(self, texts: Sequence[str | None]) -> pa.Array:
        """Valid answers as their column; None is null."""
        if self.node is not None:
            return to_array(self.kind, texts)
        return from_values(self.kind, texts)

    def texts(self, values: pa.Array | pa.ChunkedArray) -> list[str | None]:
        """Texts of which `values` makes the same column."""
        if self.node is not None:
            return to_texts(self.kind, values)
        texts: list[str | None] = values.cast(pa.string()).to_pylist()
        return texts

    def _fault_of_values(self, texts: Sequence[str]) -> str | None:
        try:
            self.values(texts)
        except ValueError as error:
            return str(error)
        return None


def _to_struct(lists: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """A struct with a field for each place of the lists, which are as long as there are names."""
    array = pa.chunked_array(lists.chunks, lists.type).combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    there = array.is_valid().to_numpy(zero_copy_only=False)
    numbers = np.zeros((len(array), len(names)))
    numbers[there] = array.drop_null().flatten().to_numpy().reshape(-1, len(names))
    fields = [pa.array(column, mask=~there) for column in numbers.T]
    return pa.StructArray.from_arrays(fields, list(names), mask=pa.array(~there))


def _to_lists(structs: pa.ChunkedArray) -> pa.Array:
    """The values of each struct in the order of its fields."""
    names = [field.name for field in structs.type]
    rows = [value and [value[name] for name in names] for value in structs.to_pylist()]
    return pa.array(rows, pa.list_(pa.float64()))


def text_format(probabilities: bool = False) -> AnswerFormat:
    """Answers that are texts of which each row has its own choices."""
    return AnswerFormat(None, Kind("string"), probabilities=probabilities)


def number_format() -> AnswerFormat:
    """Answers that are numbers, float64."""
    return AnswerFormat(None, Kind("float"))


def answer_format(
    schema: dict[str, Any] | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    probabilities: bool = False,
) -> AnswerFormat | None:
    """The format of a job's answers; None where none of the three is given.

    Raises:
        JobError: what is wrong with it, or not supported.
    """
    if schema is not None:
        return _of_schema(json.dumps(schema))
    if regex is not None:
        return _of_regex(regex)
    return None if choices is None else _of_choices(tuple(choices), probabilities)


@cache
def _of_schema(text: str) -> AnswerFormat:
    schema = json.loads(text)
    node, is_whole = read_schema(schema)
    return AnswerFormat(node, kind_of(node)) if is_whole else _of_recursive(schema)


def _of_recursive(schema: Any) -> AnswerFormat:
    """Documents of as many levels as an automaton of MAX_LEVEL_STATES has room for."""
    found = None
    for levels in range(1, MAX_LEVELS + 1):
        node, _ = read_schema(schema, levels)
        if is_never(node):
            continue
        room = MAX_STATES if found is None else MAX_LEVEL_STATES
        made = AnswerFormat(node, kind_of(node), levels=levels, max_states=room)
        if found is not None and not _fits(made):
            break
        found = made
    if found is None:
        raise no_value()
    return found


def _fits(made: AnswerFormat) -> bool:
    """Whether it has an automaton, which is built for good."""
    try:
        return made.automaton is not None
    except JobError:
        return False


@cache
def _of_regex(expression: str) -> AnswerFormat:
    return AnswerFormat(None, Kind("string"), expression)


@cache
def _of_choices(texts: tuple[str, ...], probabilities: bool) -> AnswerFormat:
    return AnswerFormat(None, Kind("enum", texts=texts), probabilities=probabilities)


def _regex(expression: str) -> Automaton:
    where = "answer.regex"
    try:
        automaton = pattern(expression)
    except NotRegular as error:
        raise JobError(f"{expression!r} has {error}", where, "leave it out, or use answer.choices") from None
    except TooLarge:
        what = f"the automaton of {expression!r} has too many states"
        raise JobError(what, where, "use smaller repetitions") from None
    if automaton.is_empty:
        raise JobError(f"{expression!r} matches no text", where, "look for parts that exclude each other")
    return automaton
