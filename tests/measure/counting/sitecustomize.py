"""Counts requests to the store in whatever process of batchrun Python starts: a byte for each, in a file a process.

On PYTHONPATH, with COUNT_REQUESTS naming a folder; see `tests/measure/scaling.py`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from typing import Any

STORES = {"batchrun.storage.local": "LocalStore", "batchrun.storage.remote": "RemoteStore"}
REQUESTS = ("find", "read", "size", "modified", "put", "create", "delete", "abort_uploads")


class Counting(importlib.abc.MetaPathFinder):
    """Finds the modules of stores as everybody else does, and wraps their requests."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._inside: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in STORES or fullname in self._inside:
            return None
        self._inside.add(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            store = getattr(module, STORES[fullname])
            for name in REQUESTS:
                setattr(store, name, self._counted(getattr(store, name)))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _counted(self, request: Any) -> Any:
        @functools.wraps(request)
        def counted(*args: Any, **named: Any) -> Any:
            with open(os.path.join(self._folder, str(os.getpid())), "ab") as file:
                file.write(b".")
            return request(*args, **named)

        return counted


if folder := os.environ.get("COUNT_REQUESTS"):
    sys.meta_path.insert(0, Counting(folder))
