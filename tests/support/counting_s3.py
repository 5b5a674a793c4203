"""An S3 server that counts what it is asked: `python -m tests.support.counting_s3 PORT`; GET /counts tells.

Counts are by kind of request (GET, HEAD, LIST, PUT, DELETE) and by place: the key's folders, without partitions'.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

Start = Callable[..., Any]


class Counting:
    """moto, with a count of requests before it."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        if path == "/counts":
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._counts).encode()]
        with self._lock:
            self._counts[f"{kind(environ['REQUEST_METHOD'], query)} {place(path, query)}"] += 1
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer


def kind(method: str, query: str) -> str:
    """What S3 bills and limits it as, but that lists and deletions are told apart."""
    words = parse_qs(query, keep_blank_values=True)
    if method == "GET" and ("list-type" in words or "prefix" in words):
        return "LIST"
    if method == "POST" and "delete" in words:
        return "DELETE"
    return method


def place(path: str, query: str) -> str:
    """The folder within the bucket, without the numbers of partitions."""
    prefix = parse_qs(query).get("prefix", [""])[0]
    _, _, key = path.lstrip("/").partition("/")
    folder = (key or prefix).rpartition("/")[0]
    return re.sub(r"/\d{5,}-.*", "", folder) or "bucket"


class Silent(WSGIRequestHandler):
    """Connections stay open, as a store's do, and nothing is logged."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Says nothing."""


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), Counting(), threaded=True, request_handler=Silent)
