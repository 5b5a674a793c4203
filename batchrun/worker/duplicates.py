"""Rows with the same prompt: one of them is generated, the others get a copy of its answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields, replace
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import numpy as np

from batchrun.engine.protocol import Completion, Request, Sampling, TokenValues

# Answers that a worker remembers from partition to partition, and what one takes besides its tokens. The oldest ones
# that nobody asked for since are forgotten first.
REMEMBERED_BYTES, ANSWER_BYTES = 64 << 20, 300

# Fields of a request that do not decide its answer. All others do, whatever they are; `row_seed` where it is sampled.
_NOT_DECIDING = {"id", "token_ids", "row_seed", "generated", "values", "cancelled", "waiting", "stream"}
_deciding = attrgetter(*(field.name for field in fields(Request) if field.name not in _NOT_DECIDING))


class KnownAnswers:
    """What the partitions of one run on one worker know of each other's prompts, by key: answers, and who is at it.

    Whoever holds a claim generates the answer. Any thread may use it.
    """

    def __init__(self, most_bytes: int = REMEMBERED_BYTES) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        # Grows whenever a claim ends.
        self.changes = 0
        self._lock = threading.Lock()
        # Token ids as bytes, finish reason, values: of hundreds of thousands of answers nothing that the garbage
        # collector would go through.
        self._answers: OrderedDict[bytes, tuple[bytes, str, TokenValues | None]] = OrderedDict()
        self._claims: dict[bytes, object] = {}

    def find(self, key: bytes) -> Completion | None:
        """The answer, if it is there and was not forgotten."""
        with self._lock:
            if key not in self._answers:
                return None
            self._answers.move_to_end(key)
            token_ids, finish_reason, values = self._answers[key]
        return Completion(0, np.frombuffer(token_ids, np.int32), finish_reason, values=values or {})

    def claim(self, key: bytes, owner: object) -> bool:
        """Whether this owner is to generate the answer: nobody else is at it."""
        with self._lock:
            return self._claims.setdefault(key, owner) is owner

    def tell(self, key: bytes, completion: Completion) -> None:
        """The answer, whose claim ends; a fault is nobody else's."""
        # Copies: what comes from an engine are views of packs.
        values = completion.values and {name: column.copy() for name, column in completion.values.items()}
        answer = completion.token_ids.tobytes(), completion.finish_reason, values or None
        with self._lock:
            self._claims.pop(key, None)
            self.changes += 1
            if completion.fault is not None or key in self._answers:
                return
            self._answers[key] = answer
            self._bytes += _size(answer)
            while self._bytes > self._most_bytes:
                self._bytes -= _size(self._answers.popitem(last=False)[1])

    def let_go(self, key: bytes, owner: object) -> None:
        """Ends the owner's claim: others may generate the answer."""
        with self._lock:
            if self._claims.get(key) is owner:
                del self._claims[key]
                self.changes += 1

    def release(self, owner: object) -> None:
        """Ends the owner's claims: others may generate those answers."""
        with self._lock:
            self._claims = {key: other for key, other in self._claims.items() if other is not owner}
            self.changes += 1


class Duplicates:
    """The rows of one partition that wait for another row's answer.

    `is_merging_samples` takes rows for the same that would be sampled differently, since their places differ.
    """

    def __init__(self, known: KnownAnswers, sampling: Sampling, is_merging_samples: bool) -> None:
        self._known = known
        self._sampling, self._is_merging_samples = sampling, is_merging_samples
        # What most requests of a job have in common is digested once.
        self._common: tuple[Any, ...] = ()
        self._begun = blake2b(digest_size=16)
        # By key: rows that get a copy, None where there are none yet. Those without a request wait for a row of their
        # own partition.
        self._waiting: dict[bytes, list[int] | None] = {}
        self._elsewhere: dict[bytes, Request] = {}
        self._keys: dict[int, bytes] = {}
        self._looked = -1
        self._copies: list[Completion] = []

    def admit(self, request: Request) -> bool:
        """Whether the request is to be generated. Its row's copy comes with `take` otherwise."""
        key = self._key(request)
        if key in self._waiting:
            if (rows := self._waiting[key]) is None:
                self._waiting[key] = [request.id]
            else:
                rows.append(request.id)
        elif (answer := self._known.find(key)) is not None:
            self._copies.append(replace(answer, id=request.id))
        elif self._known.claim(key, self):
            self._keys[request.id], self._waiting[key] = key, None
            return True
        else:
            self._waiting[key], self._elsewhere[key] = [request.id], request
        return False

    @property
    def are_elsewhere(self) -> bool:
        """Whether rows wait for what another partition generates."""
        return bool(self._elsewhere)

    def left_to_us(self) -> Iterator[Request]:
        """Looks what has become of rows elsewhere: requests that are to be generated here after all, since the other
        partitions have let go of them."""
        if self._looked == self._known.changes:
            return
        self._looked = self._known.changes
        for key, request in list(self._elsewhere.items()):
            if (answer := self._known.find(key)) is not None:
                del self._elsewhere[key]
                self._copies += (replace(answer, id=row) for row in self._waiting.pop(key) or ())
            elif self._known.claim(key, self):
                del self._elsewhere[key]
                # The one that waited first, with this request.
                self._waiting[key] = (self._waiting[key] or [])[1:] or None
                self._keys[request.id] = key
                yield request

    def ended(self, completion: Completion) -> None:
        """A row that was generated has its answer or fault, and so have those that wait for it."""
        key = self._keys.pop(completion.id, None)
        if key is not None:
            self._known.tell(key, completion)
            if rows := self._waiting.pop(key):
                self._copies += [replace(completion, id=row) for row in rows]

    def is_waited_for(self, row: int) -> bool:
        """Whether other rows of the partition get the answer of this one, which is generated."""
        return row in self._keys and self._waiting[self._keys[row]] is not None

    def let_go(self, row: int) -> None:
        """A row that was to be generated, and that none of the partition waits for, is not."""
        if key := self._keys.pop(row, None):
            del self._waiting[key]
            self._known.let_go(key, self)

    def take(self) -> list[Completion]:
        """The copies since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def release(self) -> None:
        """Other partitions are not to wait any longer for what is generated here."""
        self._known.release(self)

    def _key(self, request: Request) -> bytes:
        """A digest of all that decides the answer."""
        deciding = _deciding(request)
        if deciding != self._common:
            self._common, self._begun = deciding, blake2b(repr(deciding).encode(), digest_size=16)
        digest = self._begun.copy()
        digest.update(request.token_ids.tobytes())
        if (request.sampling or self._sampling).temperature > 0 and not self._is_merging_samples:
            digest.update(repr(request.row_seed).encode())
        return digest.digest()


def _size(answer: tuple[bytes, str, TokenValues | None]) -> int:
    token_ids, _, values = answer
    columns = sum([column.nbytes for column in values.values()]) if values else 0
    return ANSWER_BYTES + len(token_ids) + columns
