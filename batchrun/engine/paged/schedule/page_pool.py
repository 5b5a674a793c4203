"""Pages of the key/value pool: who holds which, and which of them already hold the start of a prompt."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from batchrun.engine.paged.schedule.sequence import NO_ROOT, common_prefix
from batchrun.engine.protocol import TokenIds

NULL_PAGE = 0
"""The page that finished sequences and padding write to; never handed out, never read for a result."""

MIN_COPIED_TOKENS, MIN_MORE_TOKENS = 16, 2
"""Tokens. Computing fewer again costs less than a copy and a prefill batch cut short; behind others that are shared,
which make the copy and the detour through the pages needed anyway, that is so of fewer still."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The start of a prompt that the pool holds: whole `pages`, then `copied` tokens at the start of `copy_from`.

    `wait`: a sequence of the prefill batch now being put together will hold so many tokens more of it, once that is
    computed; 0 where those are not worth waiting for.
    """

    pages: tuple[int, ...] = ()
    copy_from: int = NULL_PAGE
    copied: int = 0
    wait: int = 0


class PagePool:
    """Reference counts of pages, and an index of prompt pages by content.

    A page is *free*, *held* (by one sequence or several) or *evictable*: held by nobody, but indexed, so that it is the
    last to be given out again. Indexed pages are told apart by a digest of every token up to their end, since
    keys and values depend on all of them; so a parent that is gone makes no child wrong, only unreachable.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = pages - 1
        self._free_pages = list(range(pages - 1, NULL_PAGE, -1))
        self._ref_counts = [0] * pages
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._full_pages: dict[bytes, int] = {}
        self._page_hash: dict[int, bytes] = {}
        self._hashes = _PageHashes(page_size)
        self._copyable = _Tails()
        self._pending = _Tails()
        self.copy_sources: list[int] = []

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free_pages) + len(self._evictable)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages for one holder; their former content is forgotten. `count` may not exceed `available`."""
        allocated = []
        for _ in range(count):
            if self._free_pages:
                page = self._free_pages.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                self._invalidate(page)
            self._ref_counts[page] = 1
            allocated.append(page)
        return allocated

    def num_evictable(self, pages: Iterable[int]) -> int:
        """How many of them `available` counts: sharing those makes it smaller."""
        return sum(page in self._evictable for page in pages)

    def keep_copy_source(self, copy_from: int) -> None:
        """Holds a page that is copied from until `launched`, so that it stays as it is."""
        self.share([copy_from])
        self.copy_sources.append(copy_from)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._evictable.pop(page, None)
            self._ref_counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One holder fewer for each.

        Deepest pages become evictable first, so that the start of a prompt, which serves most sequences,
        is kept longest.
        """
        for page in reversed(list(pages)):
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if page in self._page_hash or page in self._copyable:
                    self._evictable[page] = None
                else:
                    self._free_pages.append(page)

    def match_prefix(self, tokens: TokenIds, computed: int = 1, root: bytes = NO_ROOT) -> PrefixMatch:
        """What is held of a prompt; its last `computed` tokens never are, because their logits are wanted. Prompts of
        different roots have nothing in common."""
        size, most = self.page_size, len(tokens) - computed
        pages: list[int] = []
        prefix_hash = root
        for page_hash in self._hashes.of(tokens, most // size, root):
            if page_hash not in self._full_pages:
                break
            pages.append(self._full_pages[page_hash])
            prefix_hash = page_hash
        # One token short of a page: a copy that filled it would leave the sequence's first own token on the next one.
        rest = tokens[len(pages) * size : min((len(pages) + 1) * size - 1, most)]
        copied, copy_from = self._copyable.nearest(prefix_hash, rest)
        pending, _ = self._pending.nearest(prefix_hash, rest)
        least = MIN_MORE_TOKENS if pages else MIN_COPIED_TOKENS
        if copied < least:
            copied, copy_from = 0, NULL_PAGE
        more = pending - copied
        wait = more if more >= (MIN_MORE_TOKENS if copied else least) else 0
        return PrefixMatch(tuple(pages), copy_from, copied, wait)

    def insert(
        self, tokens: TokenIds, pages: list[int], start: int, stop: int, root: bytes = NO_ROOT
    ) -> None:
        """Says that the prefill batch being put together computes `tokens[start:stop]` into a sequence's `pages`.

        Whole pages can be shared from now on, by sequences of the same prefill batch too: each layer writes all of a
        prefill batch's keys and values before it reads any. A page can be copied from only after `launched`.
        """
        size = self.page_size
        prefix_hash, hashes = root, self._hashes.of(tokens, stop // size, root)
        for number in range(self.pages_for(stop)):
            page = pages[number]
            begin, end = number * size, min((number + 1) * size, stop)
            if end > start and page not in self._copyable:
                self._pending.add(prefix_hash, page, tokens[begin:end])
            if end - begin < size:
                break
            prefix_hash = hashes[number]
            if end > start and prefix_hash not in self._full_pages and page not in self._page_hash:
                self._full_pages[prefix_hash], self._page_hash[page] = page, prefix_hash

    def launched(self) -> None:
        """The prefill batch was handed to the device: its pages can be copied from, its copies have been made."""
        for page in self._pending:
            if self._ref_counts[page]:
                self._copyable.take(page, self._pending)
        self._pending = _Tails()
        self.free(self.copy_sources)
        self.copy_sources.clear()

    def invalidate(self, pages: Iterable[int]) -> None:
        """What was said of these pages, which are held, is not so: nobody may share or copy them."""
        for page in pages:
            self._invalidate(page)
            self._pending.remove(page)

    def check(self, holdings: Iterable[list[int]]) -> None:
        """Raises AssertionError unless every page is free, evictable or held by exactly the given page lists."""
        count = [0] * len(self._ref_counts)
        for pages in holdings:
            for page in pages:
                count[page] += 1
        assert count == self._ref_counts, "reference counts differ from the rows' page lists"
        held = sum(1 for holders in count if holders)
        assert not count[NULL_PAGE], "the null page is held"
        assert NULL_PAGE not in {*self._evictable, *self._free_pages}, "the null page can be allocated"
        assert len(set(self._free_pages)) == len(self._free_pages), "a page is free twice"
        assert not set(self._free_pages) & set(self._evictable), "a page is free and evictable"
        assert held + self.available == self.num_pages, "pages have leaked"

    def _invalidate(self, page: int) -> None:
        page_hash = self._page_hash.pop(page, None)
        if page_hash is not None:
            del self._full_pages[page_hash]
        self._copyable.remove(page)


class _PageHashes:
    """Digests of a prompt's pages, each of every token up to the page's end.

    Prompts come in an order in which those that begin alike follow each other: what one has in common with the one
    before is not digested again.
    """

    def __init__(self, page_size: int) -> None:
        self._size = page_size
        self._tokens: TokenIds = np.empty(0, np.int32)
        self._root = NO_ROOT
        self._hashes: list[bytes] = []

    def of(self, tokens: TokenIds, pages: int, root: bytes) -> list[bytes]:
        """Those of the first so many pages, all of them whole."""
        if root != self._root:
            self._root = root
            self._hashes.clear()
        if tokens is not self._tokens:
            common = common_prefix(tokens, self._tokens[: len(self._hashes) * self._size])
            del self._hashes[common // self._size :]
            self._tokens = tokens
        while len(self._hashes) < pages:
            first = len(self._hashes) * self._size
            parent = self._hashes[-1] if self._hashes else root
            block = tokens[first : first + self._size].tobytes()
            self._hashes.append(blake2b(parent + block, digest_size=16).digest())
        return self._hashes[:pages]


class _Tails:
    """Pages that hold some tokens behind a prefix, by that prefix and in the order of those tokens.

    Of tokens in order, those with most in common stand side by side.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, list[tuple[bytes, int]]] = {}
        self._entries: dict[int, tuple[bytes, bytes]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._entries

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def add(self, prefix_hash: bytes, page: int, tokens: TokenIds) -> None:
        """The page, which is not there yet, holds these tokens behind the prefix."""
        self._insert(page, prefix_hash, tokens.tobytes())

    def take(self, page: int, other: _Tails) -> None:
        """The page, which is not there yet, holds what it holds in the other ones."""
        self._insert(page, *other._entries[page])

    def remove(self, page: int) -> None:
        """The page holds nothing any more, if it did."""
        if page not in self._entries:
            return
        prefix_hash, tail = self._entries.pop(page)
        pages = self._pages[prefix_hash]
        del pages[bisect_left(pages, (tail, page))]
        if not pages:
            del self._pages[prefix_hash]

    def nearest(self, prefix_hash: bytes, tokens: TokenIds) -> tuple[int, int]:
        """How many of the tokens behind the prefix a page holds at most, and which; 0 and NULL_PAGE without any."""
        best = (0, NULL_PAGE)
        if pages := self._pages.get(prefix_hash):
            place = bisect_left(pages, (tokens.tobytes(), 0))
            for tail, page in pages[max(0, place - 1) : place + 1]:
                common = common_prefix(tokens, np.frombuffer(tail, np.int32))
                if common > best[0]:
                    best = (common, page)
        return best

    def _insert(self, page: int, prefix_hash: bytes, tail: bytes) -> None:
        insort(self._pages.setdefault(prefix_hash, []), (tail, page))
        self._entries[page] = (prefix_hash, tail)
