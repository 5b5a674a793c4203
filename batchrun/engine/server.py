"""The engine's side of the process border: `python -m batchrun.engine.server <socket> <parent's pid> <kind or "">`."""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

from batchrun.engine.choose import load_engine, preload
from batchrun.engine.processes import abort, ahead, stage
from batchrun.engine.processes.last_words import error_line, lines_of
from batchrun.engine.processes.launch import die_with_parent
from batchrun.engine.processes.wire import (
    PLACE_BITS,
    PLACE_MASK,
    Cancel,
    CompletionPack,
    Failed,
    Prepare,
    Recall,
    Recalled,
    RequestPack,
)
from batchrun.engine.protocol import NO_TOKENS, Completion, Engine, EngineSpec, EngineStats, Request
from batchrun.errors import BatchrunError, EngineError, EngineNotLoaded

STATS_SECONDS = 0.2
SIGN_SECONDS = 2.0
LAST_WORD_SECONDS = 2.0
PACK_ROWS = 1024
# The sender lets a burst gather for so long: a pack costs some 100 us on both sides, whatever is in it.
GATHER_SECONDS = 0.002


class Server:
    """Streams of requests in one order into the engine, completions out to whichever stream they belong to.

    Three threads: the reader fills the inbox, the main thread runs the engine, the sender empties the
    outbox. So neither a busy engine nor a slow parent ever blocks the socket for the other side.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox: queue.SimpleQueue[RequestPack] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[Completion | Recalled | Failed] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.dropped: set[int] = set()  # those of them that want nothing back
        self.in_hand: dict[int, Request] = {}
        # By stream, the last place that the engine has come to.
        self.reached: dict[int, int] = {}
        # Given back, while the engine has yet to let go of them, or to come to them.
        self.recalled: set[int] = set()
        # Around what says where a request is, so that each is answered once.
        self.whereabouts = threading.Lock()
        self.engine: Engine | None = None
        self.sender = threading.Thread(target=self._send, daemon=True)

    def serve(self, kind: str = "") -> None:
        """Loads the engine that the parent asks for; runs until the parent is gone or the engine fails. Meanwhile
        imports what one of this kind needs."""
        # Collections during all the imports and tracing find nothing and take a fifth of the time.
        gc.disable()
        asked: queue.SimpleQueue[EngineSpec] = queue.SimpleQueue()
        threading.Thread(target=self._await_spec, args=(asked,), daemon=True).start()
        if kind:
            preload(kind)
        spec = asked.get()
        threading.Thread(target=self._read, daemon=True).start()
        self.sender.start()
        try:
            self._run(spec)
        except BatchrunError as error:
            self.outbox.put(Failed(error))
        except BaseException as error:
            traceback.print_exc()
            failure, doing = (
                (EngineError, "failed") if self.engine else (EngineNotLoaded, "could not be loaded")
            )
            self.outbox.put(Failed(failure(f"engine {doing}: {_named(error)}", spec.model_path)))
        self.sender.join()

    def _await_spec(self, asked: queue.SimpleQueue[EngineSpec]) -> None:
        try:
            message = self.connection.recv()
            if isinstance(message, Prepare):
                ahead.prepare(message.model_path)
                message = self.connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        asked.put(message)
        ahead.prepare(message.model_path)

    def _run(self, spec: EngineSpec) -> None:
        started = time.time()
        # While the engine loads, the sender has nothing to say, so the connection is this thread's alone.
        stage.listen(lambda name: self.connection.send(CompletionPack.pack([], EngineStats(stage=name))))
        self.engine = load_engine(spec)
        gc.freeze()
        gc.enable()
        times = self.engine.stats.times
        times["engine ready"] = time.time()
        self.engine.stats.load_seconds = times["engine ready"] - started
        # Before any request is read, so before the sender has anything to say: the parent learns that it is loaded.
        self.connection.send(CompletionPack.pack([], self._stats()))
        abort.listen(self._fail)
        for completion in self.engine.generate(self._requests()):
            with self.whereabouts:
                del self.in_hand[completion.id]
                if completion.id in self.recalled:
                    self.recalled.remove(completion.id)
                    continue
                self.outbox.put(completion)
            times["last row"] = time.time()
            times.setdefault("first row", times["last row"])
        raise EngineError("the engine stopped while requests were still coming", spec.kind)

    def _fail(self, error: EngineError) -> None:
        """In another thread than the engine's: has the parent hear of the error before the process ends."""
        self.outbox.put(Failed(error))
        self.sender.join(LAST_WORD_SECONDS)

    def _requests(self) -> Iterator[Request | None]:
        while True:
            try:
                pack = self.inbox.get(block=not self.in_hand)
            except queue.Empty:
                yield None
                continue
            for request in pack.unpack():
                with self.whereabouts:
                    self.reached[pack.stream] = request.id & PLACE_MASK
                    if request.id in self.recalled:
                        self.recalled.remove(request.id)
                        continue
                    if pack.stream in self.cancelled:
                        self.outbox.put(request.so_far())
                        continue
                    self.in_hand[request.id] = request
                yield request

    def _read(self) -> None:
        try:
            while True:
                message = self.connection.recv()
                if isinstance(message, Cancel):
                    self._cancel(message)
                elif isinstance(message, Recall):
                    self._recall(message)
                else:
                    self.inbox.put(message)
        except (EOFError, OSError):
            # The parent is gone. The engine may be deep in the model: only the whole process can leave.
            os._exit(0)

    def _cancel(self, message: Cancel) -> None:
        self.cancelled.add(message.stream)
        if not message.keep:
            self.dropped.add(message.stream)
        for request in list(self.in_hand.values()):
            request.cancelled = request.cancelled or request.id >> PLACE_BITS == message.stream

    def _recall(self, message: Recall) -> None:
        """The engine is not asked, which may be deep in the model: it lets go later of what is given back now."""
        left = message.most
        with self.whereabouts:
            for places, work in zip(message.places, message.work, strict=True):
                if left <= 0:
                    break
                if all(self._waits(message.stream, place) for place in places):
                    left -= work
                    for place in places:
                        self._give_back((message.stream << PLACE_BITS) + place)
        self.outbox.put(Recalled(message.stream))

    def _waits(self, stream: int, place: int) -> bool:
        """Whether nothing has been begun of the request."""
        request = self.in_hand.get((stream << PLACE_BITS) + place)
        if request is None:
            return place > self.reached.get(stream, -1)
        return request.waiting and not request.cancelled

    def _give_back(self, number: int) -> None:
        self.recalled.add(number)
        if request := self.in_hand.get(number):
            request.cancelled = True
        self.outbox.put(Completion(number, NO_TOKENS, "cancelled"))

    def _send(self) -> None:
        try:
            self._send_until_failed()
        except OSError:
            os._exit(0)

    def _send_until_failed(self) -> None:
        stats_due, behind = 0.0, False
        last_stats: EngineStats | None = None
        while True:
            try:
                # A stream's last completions carry stats too, if late: nobody is left to bring newer ones
                # along. And so does a long batch, to show that it is alive.
                items = [self.outbox.get(timeout=STATS_SECONDS if behind else SIGN_SECONDS)]
                time.sleep(GATHER_SECONDS)
                while len(items) < PACK_ROWS and not self.outbox.empty():
                    items.append(self.outbox.get())
            except queue.Empty:
                items = []
            failed = next((item for item in items if isinstance(item, Failed)), None)
            completions = [c for c in items if isinstance(c, Completion) and not self._is_dropped(c)]
            now = time.monotonic()
            behind = bool(items) and now < stats_due and bool(self.in_hand)
            stats = None if behind else self._stats()
            if completions or (stats is not None and stats != last_stats):
                self.connection.send(CompletionPack.pack(completions, stats))
            for recalled in (item for item in items if isinstance(item, Recalled)):
                self.connection.send(recalled)
            last_stats = stats or last_stats
            stats_due = stats_due if behind else now + STATS_SECONDS
            if failed:
                self.connection.send(failed)
                return

    def _is_dropped(self, completion: Completion) -> bool:
        return completion.id >> PLACE_BITS in self.dropped

    def _stats(self) -> EngineStats | None:
        """A copy, since the engine's thread goes on counting while this one sends."""
        if self.engine is None:
            return None
        stats = self.engine.stats
        return replace(
            stats,
            pid=os.getpid(),
            gauges=dict(stats.gauges),
            notes=list(stats.notes),
            times=dict(stats.times),
        )


def _named(error: BaseException) -> str:
    """The exception's type and first line, without what torch adds below it."""
    return error_line(lines_of("".join(traceback.format_exception(error, limit=1, chain=False))))


def main() -> None:
    """Serves the engine over the socket that is the first argument, while the parent (the second) lives."""
    descriptor, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    # Ctrl-C and a service manager's SIGTERM reach the whole group. Whether to drain or to stop is the parent's
    # decision, and what the rows are so far is lost with this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Server(Connection(descriptor)).serve(sys.argv[3])


if __name__ == "__main__":
    main()
