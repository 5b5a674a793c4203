"""Imports without what they would pull in and nobody here uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast


@contextlib.contextmanager
def hidden(packages: Iterable[str]) -> Iterator[None]:
    """Those of the packages that are not imported yet seem not to be installed."""
    modules = cast(dict[str, Any], sys.modules)
    names = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del modules[name]
