"""Stores that are there and of no use: they accept every connection and say nothing, or a byte every five seconds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: 100000\r\n\r\n"


@contextmanager
def slow_server(drip: bool) -> Iterator[str]:
    """The address of such a server on this machine."""
    with Relay(("127.0.0.1", 0)) as relay:
        relay.spoil(drip)
        yield f"http://{relay.address}"


class Relay:
    """Passes connections on to a store (host, port) until it is spoiled: no answer comes through any more then.

    `unanswered` counts the connections that wait for one.
    """

    def __init__(self, store: tuple[str, int]) -> None:
        self._store = store
        self._spoiled, self._over = threading.Event(), threading.Event()
        self._drip = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.unanswered = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.close()

    def spoil(self, drip: bool) -> None:
        """From now on requests are read and never answered; with `drip`, by a byte every five seconds."""
        self._drip = drip
        self._spoiled.set()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            if not self._spoiled.is_set():
                with socket.create_connection(self._store) as store:
                    threading.Thread(target=self._answer, args=(store, client), daemon=True).start()
                    while (data := client.recv(1 << 16)) and not self._spoiled.is_set():
                        store.sendall(data)
            else:
                data = client.recv(1 << 16)
            if data:
                self._stay_silent(client)

    def _answer(self, store: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while (data := store.recv(1 << 16)) and not self._spoiled.is_set():
                client.sendall(data)
            if not self._spoiled.is_set():
                client.close()

    def _stay_silent(self, client: socket.socket) -> None:
        self.unanswered += 1
        drip = self._drip
        if drip:
            client.sendall(HEAD)
        while not self._over.wait(5.0):
            if drip:
                client.sendall(b" ")
