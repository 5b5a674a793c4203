"""Pages of the key/value pool: who holds which, and which of them already hold the start of a prompt."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from batchrun.engine.protocol import TokenIds

TRASH = 0
"""The page that finished rows and padding write to; never handed out, never read for a result."""

SHORTEST_COPY = 16
"""Tokens. Computing fewer again costs less than a copy and a pack cut short."""

_TAILS_KEPT = 4
_ROOT = b""


@dataclass(frozen=True, slots=True)
class Match:
    """The start of a prompt that the pool holds: whole `pages`, then `copied` tokens at the start of `source`.

    `wait`: a row of the pack now being put together will hold more of it, once that pack has been computed.
    """

    pages: tuple[int, ...] = ()
    source: int = TRASH
    copied: int = 0
    wait: bool = False


class Pool:
    """Reference counts of pages, and an index of prompt pages by content.

    A page is *free*, *held* (by one row or several) or *idle*: held by nobody, but indexed, so that it is the
    last to be given out again. Indexed pages are told apart by a digest of every token up to their end, since
    keys and values depend on all of them; so a parent that is gone makes no child wrong, only unreachable.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages = pages - 1
        self._free = list(range(pages - 1, TRASH, -1))
        self._holders = [0] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._whole: dict[bytes, int] = {}
        self._tails: dict[bytes, deque[tuple[int, TokenIds]]] = {}
        self._digest: dict[int, bytes] = {}
        self._parent: dict[int, bytes] = {}
        self._coming: dict[bytes, tuple[int, TokenIds]] = {}
        self.borrowed: list[int] = []

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder; their former content is forgotten. `count` may not exceed `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def idle(self, pages: Iterable[int]) -> int:
        """How many of them `available` counts: sharing those makes it smaller."""
        return sum(page in self._idle for page in pages)

    def borrow(self, source: int) -> None:
        """Keeps a page that is copied from as it is, until `launched`."""
        self.share([source])
        self.borrowed.append(source)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each.

        Deepest pages go idle first, so that the start of a prompt, which serves most rows, is kept longest.
        """
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._digest or page in self._parent:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: TokenIds) -> Match:
        """What is held of a prompt; its last token never is, because its logits are wanted."""
        size, most = self.page_size, len(tokens) - 1
        pages: list[int] = []
        digest = _ROOT
        while (len(pages) + 1) * size <= most:
            following = self._chain(digest, tokens, len(pages))
            if following not in self._whole:
                break
            pages.append(self._whole[following])
            digest = following
        # One token short of a page: a copy that filled it would leave the row's first own token on the next one.
        rest = tokens[len(pages) * size : min((len(pages) + 1) * size - 1, most)]
        copied, source = 0, TRASH
        for page, held in self._tails.get(digest, ()):
            common = _common(rest, held)
            if common > copied:
                copied, source = common, page
        if digest in self._coming and _common(rest, self._coming[digest][1]) >= copied + SHORTEST_COPY:
            return Match(tuple(pages), wait=True)
        if copied < SHORTEST_COPY:
            copied, source = 0, TRASH
        return Match(tuple(pages), source, copied)

    def index(self, tokens: TokenIds, pages: list[int], start: int, stop: int) -> None:
        """Says that the pack being put together computes `tokens[start:stop]` into a row's `pages`.

        Whole pages can be shared from now on, by rows of the same pack too: each layer writes all of a pack's
        keys and values before it reads any. A page can be copied from only after `launched`.
        """
        size = self.page_size
        digest = _ROOT
        for number in range(self.pages_for(stop)):
            page = pages[number]
            begin, end = number * size, min((number + 1) * size, stop)
            if end > start and digest not in self._coming and page not in self._parent:
                self._coming[digest] = (page, tokens[begin:end].copy())
            if end - begin < size:
                break
            digest = self._chain(digest, tokens, number)
            if end > start and digest not in self._whole and page not in self._digest:
                self._whole[digest], self._digest[page] = page, digest

    def launched(self) -> None:
        """The pack has been handed to the device: its pages can be copied from, its copies have been made."""
        for parent, (page, tokens) in self._coming.items():
            if self._holders[page] == 0 or page in self._parent:
                continue
            tails = self._tails.setdefault(parent, deque())
            tails.append((page, tokens))
            self._parent[page] = parent
            if len(tails) > _TAILS_KEPT:
                oldest, _ = tails.popleft()
                del self._parent[oldest]
                self._free_if_unknown(oldest)
        self._coming.clear()
        self.release(self.borrowed)
        self.borrowed.clear()

    def forget(self, pages: Iterable[int]) -> None:
        """What was said of these pages, which are held, is not so: nobody may share or copy them."""
        for page in pages:
            self._forget(page)
        self._coming = {parent: entry for parent, entry in self._coming.items() if entry[0] not in set(pages)}

    def check(self, holdings: Iterable[list[int]]) -> None:
        """Raises AssertionError unless every page is free, idle or held by exactly the given page lists."""
        count = [0] * len(self._holders)
        for pages in holdings:
            for page in pages:
                count[page] += 1
        assert count == self._holders, "reference counts differ from the rows' page lists"
        held = sum(1 for holders in count if holders)
        assert not count[TRASH], "the trash page is held"
        assert TRASH not in {*self._idle, *self._free}, "the trash page can be taken"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not set(self._free) & set(self._idle), "a page is free and idle"
        assert held + self.available == self.pages, "pages have leaked"

    def _chain(self, parent: bytes, tokens: TokenIds, number: int) -> bytes:
        block = tokens[number * self.page_size : (number + 1) * self.page_size]
        return blake2b(parent + block.tobytes(), digest_size=16).digest()

    def _forget(self, page: int) -> None:
        digest = self._digest.pop(page, None)
        if digest is not None:
            del self._whole[digest]
        parent = self._parent.pop(page, None)
        if parent is not None:
            tails = self._tails[parent]
            self._tails[parent] = deque(tail for tail in tails if tail[0] != page)
            if not self._tails[parent]:
                del self._tails[parent]

    def _free_if_unknown(self, page: int) -> None:
        if page in self._idle and page not in self._digest:
            del self._idle[page]
            self._free.append(page)


def _common(a: TokenIds, b: TokenIds) -> int:
    """How many leading tokens are equal."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter
