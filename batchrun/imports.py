"""Imports without what they would pull in and nobody here uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import metadata
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


@contextlib.contextmanager
def distributions_on_demand() -> Iterator[None]:
    """Meanwhile `importlib.metadata.packages_distributions` reads only what it is asked for. It reads about every
    package that is installed, up to 2.6 s of a start, and transformers, which calls it, wants a handful of them."""
    before = metadata.packages_distributions
    metadata.packages_distributions = lambda: _Distributions(before)
    try:
        yield
    finally:
        metadata.packages_distributions = before


class _Distributions(Mapping[str, list[str]]):
    """The distributions that packages belong to; all of them are read once one is wanted whose name is another."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __getitem__(self, package: str) -> list[str]:
        try:
            return [metadata.distribution(package).metadata["Name"]]
        except metadata.PackageNotFoundError:
            return self._all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @cached_property
    def _all(self) -> Mapping[str, list[str]]:
        found: Mapping[str, list[str]] = self._read()
        return found
