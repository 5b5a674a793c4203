"""Real code in threads that stop before each request to the store until a search lets one go on.

So a schedule is a list of choices, and a failure is replayed exactly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar

from faulty import FaultyStore
from hypothesis.stateful import RuleBasedStateMachine

from batchrun.errors import BatchrunError
from batchrun.output.layout import STAGE


class Crash(BaseException):
    """The process is gone: nothing catches this, and no request gets through any more."""


class Actor:
    """A process of the model: it runs up to its next request, and waits there for what becomes of it."""

    def __init__(self, work: Callable[[Actor], object]) -> None:
        self.work = work
        self.request: tuple[str, str] | None = None
        self.verdict: str | None = None
        self.crashed = False
        self.done = False
        self.error: BaseException | None = None
        self.seen: set[str] = set()
        self.listed: dict[int, set[int]] = {}
        self.begun: dict[int, dict[int, int]] = {}
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()
        self._stopped.acquire()

    def _run(self) -> None:
        _me.set(self)
        try:
            self.work(self)
        except Crash:
            self.crashed = True
        except BatchrunError as error:
            self.error = error
        except BaseException as error:  # handed to the search, which fails on it
            self.error = error
        self.done = True
        self.request = None
        self._stopped.release()

    def ask(self, operation: str, key: str) -> str | None:
        """Called in the actor's thread: what becomes of this request."""
        if self.crashed:
            raise Crash
        self.request = (operation, key)
        self._stopped.release()
        self._go.acquire()
        if self.verdict == "crash":
            self.crashed = True
            raise Crash
        return self.verdict

    def advance(self, verdict: str | None = None) -> None:
        self.verdict = verdict
        self._go.release()
        self._stopped.acquire()

    def finish(self) -> None:
        while not self.done:
            self.advance()


class OneThread(contextlib.nullcontext):
    """In place of a thread pool: an actor is one thread."""

    def __enter__(self) -> OneThread:
        return self

    map = staticmethod(map)


# Whoever asks, in threads that a request has for itself too.
_me: ContextVar[Actor] = ContextVar("actor")


class Interleaving(RuleBasedStateMachine):
    """The search's side: actors that it lets go on one request at a time, some of which it spoils.

    A machine made of it sets `actors` and makes `gate` that of its store.
    """

    actors: list[Actor]
    store: FaultyStore

    def let_go_on(self, which: int, requests: int, verdict: str | None) -> None:
        """One of the living actors goes on by so many requests, with the verdict on the last of them."""
        for request in range(requests):
            alive = [actor for actor in self.actors if not actor.done]
            if alive:
                self.advance(alive[which % len(alive)], verdict if request == requests - 1 else None)

    def advance(self, actor: Actor, verdict: str | None) -> None:
        assert actor.request is not None
        operation, key = actor.request
        # Of an object that is there already, no store keeps half: an upload that is cut short leaves it as it was.
        staging = operation == "put" and STAGE in key and key not in self.store.objects
        if verdict in ("truncate", "crash within") and not staging:
            verdict = {"truncate": "reset", "crash within": "crash"}[verdict]
        if verdict == "stale" and operation not in ("find", "info"):
            verdict = None
        if verdict in ("crash after", "crash within"):
            actor.crashed = True
            verdict = "lost" if verdict == "crash after" else "truncate"
        actor.advance(verdict)

    def crash_all(self) -> None:
        for actor in self.actors:
            while not actor.done:
                self.advance(actor, "crash")

    def spawn(self, work: Callable[[Actor], object]) -> Actor:
        actor = Actor(work)
        self.actors.append(actor)
        actor.start()
        return actor

    def gate(self, operation: str, key: str) -> str | None:
        return self.me().ask(operation, key)

    def me(self) -> Actor:
        return _me.get()
