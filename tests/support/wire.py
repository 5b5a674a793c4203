"""A proxy between a store's client and the store, that spoils answers: faults as each library really meets them."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_REQUEST = re.compile(rb"^([A-Z]+) (\S+) HTTP/1\.1\r\n")


@dataclass
class Wire:
    """`lose`: so many answers to writes of `key` never arrive; the store did what was asked. `answers`: what the
    next requests are answered with in the store's place (whole HTTP answers, oldest first)."""

    address: str
    key: str = "data/part"
    lose: int = 0
    lost: int = 0
    answers: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def answer(status: int, body: str = "", kind: str = "application/xml") -> bytes:
    head = f"HTTP/1.1 {status} Spoilt\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


@contextmanager
def wire(store: str) -> Iterator[Wire]:
    """A proxy to the store at `store` (host:port)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        between = Wire(f"127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=_accept, args=(server, store, between), daemon=True).start()
        yield between


def _accept(server: socket.socket, store: str, between: Wire) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            threading.Thread(target=_serve, args=(client, store, between), daemon=True).start()


def _serve(client: socket.socket, store: str, between: Wire) -> None:
    host, _, port = store.partition(":")
    with suppress(OSError), client, socket.create_connection((host, int(port))) as upstream:
        losing = threading.Event()
        threading.Thread(target=_back, args=(upstream, client, losing, between), daemon=True).start()
        writing = False
        while chunk := client.recv(1 << 16):
            if request := _REQUEST.match(chunk):
                with between.lock:
                    spoilt = between.answers.pop(0) if between.answers else None
                if spoilt is not None:
                    head, end, _ = spoilt.partition(b"\r\n\r\n")
                    client.sendall(head + end if request[1] == b"HEAD" else spoilt)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):  # the rest of the request, lest the answer is lost by a reset
                        pass
                    return
                writing = request[1] in (b"PUT", b"POST")
            if writing and between.key.encode() in chunk.replace(b"%2F", b"/"):
                with between.lock:
                    if between.lose:
                        between.lose -= 1
                        losing.set()
            upstream.sendall(chunk)


def _back(upstream: socket.socket, client: socket.socket, losing: threading.Event, between: Wire) -> None:
    with suppress(OSError):
        while chunk := upstream.recv(1 << 16):
            if losing.is_set() and not chunk.startswith(b"HTTP/1.1 100"):
                between.lost += 1
                break
            client.sendall(chunk)
        client.shutdown(socket.SHUT_RDWR)
