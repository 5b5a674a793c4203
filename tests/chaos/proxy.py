"""An HTTP proxy before the store whose requests go wrong by a schedule."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .schedule import LONGEST_BURST, SLOWEST, Verdict, verdict

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
CONNECTION_ONLY = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultyProxy:
    """Passes requests on to `store` (host, port), except for those that the schedule of `seed` spoils."""

    def __init__(self, store: tuple[str, int], only: Collection[str]) -> None:
        self.store, self.only = store, only
        self.faults: Counter[str] = Counter()
        self.stale_stage_lists = 0
        self.requests = 0
        self._seed: str | None = None
        self._number = 0
        self._burst = 0
        self._listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def storm(self, seed: str) -> None:
        """From now on requests go wrong, counted from the first."""
        with self._lock:
            self._seed, self._number, self._burst = seed, 0, 0
            self._listings.clear()

    def calm(self) -> None:
        with self._lock:
            self._seed = None

    def close(self) -> None:
        self._server.shutdown()

    def judge(self, method: str, target: str) -> Verdict:
        with self._lock:
            self.requests += 1
            if self._seed is None:
                return Verdict(None, 0.0)
            self._number += 1
            found = verdict(self._seed, self._number, self.only)
            fault = found.fault
            if fault == "burst":
                self._burst = 1 + int(found.amount * LONGEST_BURST)
            if self._burst:
                self._burst -= 1
                fault = "burst"
            elif fault == "stale" and not (is_listing(method, target) and target in self._listings):
                fault = None
            elif fault == "truncated" and method != "GET":
                fault = "reset"
            if fault:
                self.faults[fault] += 1
                self.stale_stage_lists += fault == "stale" and "stage" in target
            return Verdict(fault, found.amount)

    def remember(self, target: str, answer: tuple[int, list[tuple[str, str]], bytes]) -> None:
        with self._lock:
            self._listings[target] = answer

    def last(self, target: str) -> tuple[int, list[tuple[str, str]], bytes]:
        with self._lock:
            return self._listings[target]


def is_listing(method: str, target: str) -> bool:
    return method == "GET" and "list-type=2" in target


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the process at the other end was killed

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = self.proxy.judge(self.command, self.path)
        if found.fault == "reset":
            self._break()
            return
        if found.fault == "burst":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if found.fault == "slow":
            time.sleep(found.amount * SLOWEST)
        answer = self.proxy.last(self.path) if found.fault == "stale" else self._forward(body)
        if found.fault == "lost":
            self._break()
            return
        status, headers, data = answer
        if found.fault == "truncated" and data:
            self._answer(status, headers, data[: len(data) // 2], announced=len(data))
            self._break()
            return
        self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.store, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            headers = [(n, v) for n, v in response.getheaders() if n.lower() not in CONNECTION_ONLY]
            if self.command == "HEAD":
                headers.append(("Content-Length", response.getheader("Content-Length", "0")))
        finally:
            connection.close()
        answer = (response.status, headers, data)
        if is_listing(self.command, self.path):
            self.proxy.remember(self.path, answer)
        return answer

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, announced: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data) if announced is None else announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _break(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """The program tells of faults itself."""
