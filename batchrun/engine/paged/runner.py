"""The model on the device: prefill packs and decode rounds over the pool, as CUDA graphs where there are any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchrun.engine.noise import signed
from batchrun.engine.paged.attention import CASCADE_ROWS, Cache, using
from batchrun.engine.paged.batch import Batch, Trunk
from batchrun.engine.paged.graphs import DecodeGraphs, Graph, Shape
from batchrun.engine.paged.last_layer import LastLayer
from batchrun.engine.paged.pool import TRASH
from batchrun.engine.paged.queue import Row
from batchrun.engine.paged.sampler import BAD, Sampler
from batchrun.engine.paged.scheduler import Ints, Round, Segment
from batchrun.engine.protocol import Request

NONE = -1
"""In place of a token that a row no longer wanted."""

_BUCKETS = (2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))
NARROW_ROWS = 128


# A moment on the device: an event of its stream, or on a CPU, which computes while the host waits, the time.
Mark = torch.cuda.Event | float


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens on their way back: `tokens` (steps, at least as many as rows) int32, valid once `done` has happened."""

    rows: list[Row]
    tokens: Tensor
    began: Mark
    done: Mark

    def read(self) -> list[list[int]]:
        """Waits, and gives each row's tokens of these steps: NONE after its end, BAD where it has no next token."""
        if not isinstance(self.done, float):
            self.done.synchronize()
        columns: list[list[int]] = self.tokens[:, : len(self.rows)].t().tolist()
        return columns

    @property
    def seconds(self) -> float:
        """How long the device worked on it; once it has been read."""
        if isinstance(self.began, float) or isinstance(self.done, float):
            return cast(float, self.done) - cast(float, self.began)
        milliseconds: float = self.began.elapsed_time(self.done)
        return milliseconds / 1000


class Runner:
    """Rows live in slots: their last token, length and fate stay on the device and are read back a round later."""

    def __init__(
        self,
        model: nn.Module,
        cache: Cache,
        sampler: Sampler,
        stop_token_ids: Sequence[int],
        max_rows: int,
        max_context: int,
        decode_steps: int,
        device: torch.device,
    ) -> None:
        self.cache = cache
        self.computed_tokens = 0
        self.launches = 0
        self._model, self._sampler, self._device = model, sampler, device
        self._last_layer = LastLayer(model, cache.modules)
        self._graphs = DecodeGraphs(device)
        self._captures = device.type == "cuda"
        self._widest = 1
        self._trash_slot = max_rows
        slots = max_rows + 1

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token = zeros(torch.long, slots)
        self._length = zeros(torch.long, slots)
        self._last = zeros(torch.long, slots)
        self._origin = zeros(torch.long, slots)
        self._seed = zeros(torch.long, slots)
        self._alive = zeros(torch.bool, slots)
        self._stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=device)
        self._step = zeros(torch.long, 1)
        self._sampled = zeros(torch.int32, decode_steps, slots)
        # Captured steps read it, so it is as large as it can ever be from the start.
        pages = _power_of_two(-(-max_context // cache.page_size))
        self._largest = Shape(_bucket(max_rows), pages, 0)
        self._inputs = zeros(torch.int32, _input_size(Shape(_bucket(max_rows), pages, pages)))
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        self._seen = zeros(torch.bool, slots, vocabulary) if sampler.penalizes else None
        self._true = torch.ones((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def prefill(self, pack: list[Segment]) -> Pending:
        """Computes a pack; gives the first new token of every row that it completes."""
        size = self.cache.page_size
        copies = [segment for segment in pack if segment.copied]
        if copies:
            self.cache.copy(
                self._put([s.copy_from for s in copies], np.int64),
                self._put([s.copy_to for s in copies], np.int64),
                max(s.copied for s in copies),
            )
        counts = [s.stop - s.start for s in pack]
        # What makes the number of tokens a round one belongs to a row of the trash page.
        spare = _round_tokens(sum(counts)) - sum(counts)
        counts.append(spare)
        lengths = [*(s.stop for s in pack), spare]
        positions = np.concatenate([*(np.arange(s.start, s.stop) for s in pack), np.arange(spare)])
        tokens = np.concatenate([*(s.row.prompt[s.start : s.stop] for s in pack), np.zeros(spare, np.int32)])
        width = max(-(-spare // size), *(len(s.row.pages) for s in pack))
        tables = np.full((len(counts), width), TRASH, np.int32)
        for row, segment in enumerate(pack):
            tables[row, : len(segment.row.pages)] = segment.row.pages
        owners = np.repeat(np.arange(len(counts)), counts)
        places = tables[owners, positions // size].astype(np.int64) * size + positions % size
        starts = np.concatenate([[0], np.cumsum(counts)])
        chosen = [i for i, segment in enumerate(pack) if segment.complete]
        rows = [pack[i].row for i in chosen]
        batch = Batch(
            places=self._put(places, np.int64),
            tables=self._put(tables, np.int32),
            lengths=self._put(lengths, np.int32),
            starts=self._put(starts, np.int32),
            ends=self._put(np.concatenate([[0], np.cumsum(lengths)]), np.int32),
            longest_query=max(counts),
            longest=max(lengths),
            fresh=all(s.start == 0 for s in pack),
        )
        self.computed_tokens += len(tokens)
        self.launches += 1
        last = self._put([starts[i + 1] - 1 for i in chosen] or [0], np.int64)
        token_ids, position_ids = self._put(tokens, np.int64), self._put(positions, np.int64)
        began = self._mark()
        logits = self._forward(token_ids, position_ids, batch, last)
        if not rows:
            return Pending([], torch.empty(1, 0, dtype=torch.int32), began, self._mark())
        return self._back(rows, self._begin(rows, [pack[i].stop for i in chosen], logits)[None], began)

    @torch.no_grad()
    def decode(self, work: Round) -> Pending:
        """Runs a round and gives its tokens."""
        trunk = work.trunk if self.cache.cascades and len(work.rows) >= CASCADE_ROWS else 0
        shape = self._shape(len(work.rows), work.tables.shape[1] - trunk, trunk)
        step = self._graph(shape) if self._captures else None
        self._upload(shape, work.slots, work.tables, trunk)
        began = self._mark()
        for _ in range(work.steps):
            if step is None:
                self._decode_step(shape)
            else:
                step.replay()
        self.computed_tokens += shape.rows * work.steps
        self.launches += 1
        return self._back(work.rows, self._sampled[: work.steps, : shape.rows], began)

    def _shape(self, rows: int, pages: int, trunk: int) -> Shape:
        """Few different shapes. Only few rows share out a row's pages to several blocks, so that the width matters."""
        self._widest = max(self._widest, pages)
        return Shape(
            rows=_bucket(rows),
            pages=_power_of_two(pages if rows <= NARROW_ROWS else self._widest),
            trunk=_power_of_two(trunk) if trunk else 0,
        )

    def warm_up(self, prefill_tokens: int) -> None:
        """Runs the largest pack and the largest decode step that may come, on the trash page and slot.

        Nothing of it is kept but what was compiled: it is for finding out how much memory that takes.
        """
        rows = min(self._trash_slot, prefill_tokens)
        prompt = np.zeros(prefill_tokens // rows, np.int32)
        pack = []
        for number in range(rows):
            row = Row.of(Request(number, prompt, max_new_tokens=1))
            row.slot, row.pages = self._trash_slot, [TRASH] * -(-len(prompt) // self.cache.page_size)
            pack.append(Segment(row, 0, len(prompt)))
        self.prefill(pack).read()
        self._graph(self._largest)
        self._graphs.clear()
        self.computed_tokens = self.launches = 0

    def _graph(self, shape: Shape) -> Graph:
        """The captured decode step of a shape; captured, on rows of the trash slot, when it is first wanted."""
        graph = self._graphs.find(shape, self.cache.memory)
        if graph is None:
            self._upload(shape, np.zeros(0, np.int32), np.zeros((0, 0), np.int32), 0)
            graph = self._graphs.capture(shape, lambda: self._decode_step(shape))
        return graph

    def _upload(self, shape: Shape, slots: Ints, tables: Ints, trunk: int) -> None:
        """One copy for all that a round needs, laid out as `_views` reads it."""
        flat = torch.full((_input_size(shape),), TRASH, dtype=torch.int32)
        round_slots, common, own = (part.numpy() for part in _views(flat, shape))
        round_slots[:] = self._trash_slot
        round_slots[: len(slots)] = slots
        common[:4] = (0, trunk * self.cache.page_size, 0, shape.rows)
        if len(slots):
            common[4 : 4 + trunk] = tables[0, :trunk]
            own[: len(slots), : tables.shape[1] - trunk] = tables[:, trunk:]
        self._inputs[: len(flat)].copy_(self._pin(flat), non_blocking=True)
        self._step.zero_()

    def _decode_step(self, shape: Shape) -> None:
        """One token for each row of the round that still lives; runs under capture, so nothing is read back."""
        slots, common, tables = _views(self._inputs, shape)
        slots = slots.long()
        size = self.cache.page_size
        trunk = Trunk(common[None, 4:], common[:2], common[2:4]) if shape.trunk else None
        before = common[1]  # tokens of the trunk
        alive, length = self._alive[slots], self._length[slots]
        position = torch.where(alive, length, before)
        column = ((position - before) // size)[:, None]
        page = torch.where(alive, tables.gather(1, column)[:, 0], TRASH)
        batch = Batch(
            places=page.long() * size + position % size,
            tables=tables,
            lengths=(position + 1 - before).int(),
            trunk=trunk,
        )
        logits = self._forward(self._token[slots], position, batch, 0)
        seen = None if self._seen is None else self._seen[slots]
        token = self._sampler.choose(logits, self._seed[slots], length + 1 - self._origin[slots], seen)
        self._sampled[:, : shape.rows].index_copy_(0, self._step, torch.where(alive, token, NONE).int()[None])
        self._step += 1
        length = torch.where(alive, length + 1, length)
        self._length[slots] = length
        self._settle(slots, token, alive & self._goes_on(token, length, self._last[slots]))

    def _begin(self, rows: list[Row], lengths: list[int], logits: Tensor) -> Tensor:
        """Puts rows whose prompts are computed into their slots and chooses their first tokens."""
        slots = self._put([row.slot for row in rows], np.int64)
        length = self._put(lengths, np.int64)
        last = self._put([row.last for row in rows], np.int64)
        origin = self._put([len(row.request.token_ids) for row in rows], np.int64)
        seed = self._put([signed(row.request.row_seed) for row in rows], np.int64)
        seen = None
        if self._seen is not None:
            owners = np.repeat(np.arange(len(rows)), [len(row.prompt) for row in rows])
            tokens = self._put(np.concatenate([row.prompt for row in rows]), np.int64)
            self._seen[slots] = False
            self._seen[slots[self._put(owners, np.int64)], tokens] = True
            seen = self._seen[slots]
        token = self._sampler.choose(logits, seed, length - origin, seen)
        self._length[slots], self._last[slots] = length, last
        self._origin[slots], self._seed[slots] = origin, seed
        self._settle(slots, token, self._goes_on(token, length, last))
        return token.int()

    def _goes_on(self, token: Tensor, length: Tensor, last: Tensor) -> Tensor:
        goes_on = (token != BAD) & (length < last)
        return goes_on & ~torch.isin(token, self._stops) if len(self._stops) else goes_on

    def _settle(self, slots: Tensor, token: Tensor, alive: Tensor) -> None:
        token = token.clamp(min=0)
        self._token[slots] = token
        self._alive[slots] = alive
        if self._seen is not None:
            self._seen.index_put_((slots, token), self._true)  # a plain True comes from the host

    def _forward(self, tokens: Tensor, positions: Tensor, batch: Batch, keep: Tensor | int) -> Tensor:
        """Logits (rows, vocabulary): of all tokens with `keep` 0, else of those that it points at."""
        with (
            using(self.cache, batch),
            self._last_layer.only(keep) if isinstance(keep, Tensor) else nullcontext(),
        ):
            logits: Tensor = self._model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep
            ).logits[0]
            return logits

    def _back(self, rows: list[Row], tokens: Tensor, began: Mark) -> Pending:
        if self._device.type != "cuda":
            return Pending(rows, tokens.clone(), began, self._mark())
        pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        pinned.copy_(tokens, non_blocking=True)
        return Pending(rows, pinned, began, self._mark())

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _put(self, values: Sequence[int] | NDArray[Any], dtype: type) -> Tensor:
        return self._pin(torch.from_numpy(np.asarray(values, dtype))).to(self._device, non_blocking=True)

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _views(flat: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """A round's inputs: slots (rows,); 0, tokens of the trunk, 0, rows, and the trunk's pages; tables (rows, pages)."""
    begin, end = shape.rows, shape.rows + 4 + shape.trunk
    return flat[:begin], flat[begin:end], flat[end : _input_size(shape)].view(shape.rows, shape.pages)


def _input_size(shape: Shape) -> int:
    return shape.rows + 4 + shape.trunk + shape.rows * shape.pages


def _bucket(rows: int) -> int:
    """Rows that a captured step is made for: from 16 on at most a third more than wanted, mostly an eighth, and few
    different numbers."""
    fitting = [bucket for bucket in _BUCKETS if bucket >= rows]
    return fitting[0] if fitting else -(-rows // 128) * 128


def _round_tokens(tokens: int) -> int:
    """Up to a multiple of 8 and of about a hundredth: a number of tokens that products have not met before costs the
    host some ten milliseconds for each pack, and 1% more tokens cost less."""
    step = max(8, _power_of_two(tokens) // 64)
    return -(-tokens // step) * step


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
