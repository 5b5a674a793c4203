"""Requests and completions packed into a few arrays: a process border then costs arrays, not objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.protocol import (
    NO_TOKENS,
    Completion,
    EngineStats,
    Request,
    RowSampling,
    Scored,
    TokenIds,
    TokenValues,
)
from batchrun.engine.tokens.token_values import join
from batchrun.errors import BatchrunError, RowFault

# A request's id on the wire is its stream's number and its place in that stream.
PLACE_BITS = 40
PLACE_MASK = (1 << PLACE_BITS) - 1


@dataclass(frozen=True, slots=True)
class RequestPack:
    """Requests of one stream, the first at `first_place`; token ids end to end, those of a prompt that is the one
    before (another sample) left out, with length 0; `generated`, `sampling`, `scored`, `answer_states` and `adapters`
    by index, being rare: what is the same for many requests crosses once."""

    stream: int
    first_place: int
    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    max_new_tokens: NDArray[np.int32]
    row_seeds: list[int]
    generated: dict[int, tuple[TokenIds, TokenValues]]
    sampling: dict[int, RowSampling] = field(default_factory=dict)
    scored: dict[int, Scored] = field(default_factory=dict)
    answer_states: dict[int, int] = field(default_factory=dict)
    adapters: dict[int, int] = field(default_factory=dict)

    @classmethod
    def pack(cls, stream: int, first_place: int, requests: Sequence[Request]) -> RequestPack:
        """Packs requests of a stream, of which `first_place` were sent before."""
        same = (one.token_ids is before.token_ids for before, one in pairwise(requests))
        prompts = [
            NO_TOKENS if known else one.token_ids for known, one in zip((False, *same), requests, strict=True)
        ]
        return cls(
            stream,
            first_place,
            np.concatenate(prompts).astype(np.int32, copy=False),
            np.array([len(ids) for ids in prompts], np.int32),
            np.array([request.max_new_tokens for request in requests], np.int32),
            [request.row_seed for request in requests],
            {i: (one.generated, one.values) for i, one in enumerate(requests) if len(one.generated)},
            {i: one.sampling for i, one in enumerate(requests) if one.sampling},
            {i: one.scored for i, one in enumerate(requests) if one.scored is not None},
            {i: one.answer_state for i, one in enumerate(requests) if one.answer_state is not None},
            {i: one.adapter for i, one in enumerate(requests) if one.adapter},
        )

    def unpack(self) -> Iterator[Request]:
        """The requests, under ids of the wire's own: the stream's number and the place in it."""
        number = (self.stream << PLACE_BITS) + self.first_place
        start, ids = 0, NO_TOKENS
        for i, (length, limit, seed) in enumerate(
            zip(self.lengths.tolist(), self.max_new_tokens.tolist(), self.row_seeds, strict=True)
        ):
            generated, values = self.generated.get(i, (NO_TOKENS, {}))
            if length:
                ids = self.token_ids[start : start + length]
            yield Request(
                number + i, ids, limit, seed, generated, stream=self.stream, values=values,
                sampling=self.sampling.get(i), scored=self.scored.get(i), answer_state=self.answer_states.get(i),
                adapter=self.adapters.get(i, 0),
            )  # fmt: skip
            start += length


@dataclass(frozen=True, slots=True)
class CompletionPack:
    """Completions of any streams; `faults` by index, since they are rare; `stats` now and then."""

    ids: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    finish_reasons: list[str]
    faults: dict[int, RowFault]
    stats: EngineStats | None
    values: TokenValues

    @classmethod
    def pack(cls, completions: Sequence[Completion], stats: EngineStats | None) -> CompletionPack:
        """Packs completions of any streams, perhaps none."""
        arrays = [completion.token_ids for completion in completions]
        return cls(
            np.array([completion.id for completion in completions], np.int64),
            np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.empty(0, np.int32),
            np.array([len(array) for array in arrays], np.int32),
            [completion.finish_reason for completion in completions],
            {i: completion.fault for i, completion in enumerate(completions) if completion.fault},
            stats,
            join([completion.values for completion in completions]),
        )

    def by_stream(self) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Each stream's number with the indices of its completions."""
        streams = self.ids >> PLACE_BITS
        for stream in np.unique(streams).tolist():
            yield stream, np.flatnonzero(streams == stream)

    def unpack(self, indices: NDArray[np.intp], pending: dict[int, int]) -> Iterator[Completion]:
        """Those completions, each taking its request's own id out of `pending` (place in the stream: id)."""
        ends = np.cumsum(self.lengths)[indices].tolist()
        lengths = self.lengths[indices].tolist()
        places = (self.ids[indices] & PLACE_MASK).tolist()
        for i, place, end, length in zip(indices.tolist(), places, ends, lengths, strict=True):
            yield Completion(
                pending.pop(place),
                self.token_ids[end - length : end],
                self.finish_reasons[i],
                self.faults.get(i),
                {name: column[end - length : end] for name, column in self.values.items()},
            )


@dataclass(frozen=True, slots=True)
class Prepare:
    """To a process that stands by: the engine that it will be asked for has its weights in this folder."""

    model_path: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this stream's answers any more; with `keep`, what its rows are so far is wanted back."""

    stream: int
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Recall:
    """Another engine could take over rows of this stream: those that none has begun with come back as "cancelled", of
    the first ones so many as make up `most`.

    A row's requests go together: `places` in the stream of each row's, `work` of each, in a unit of its own.
    """

    stream: int
    places: list[list[int]]
    work: list[float]
    most: float


@dataclass(frozen=True, slots=True)
class Recalled:
    """Whatever came back for a stream's recall has been sent."""

    stream: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine's last word before its process ends."""

    error: BatchrunError
