"""Imports without what nobody uses."""

from __future__ import annotations

from importlib import metadata

import pytest

from batchrun.imports import distributions_on_demand


def test_of_installed_packages_only_those_are_read_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = metadata.packages_distributions()
    read: list[bool] = []

    def read_all() -> dict[str, list[str]]:
        read.append(True)
        return dict(every)

    monkeypatch.setattr(metadata, "packages_distributions", read_all)
    with distributions_on_demand():
        found = metadata.packages_distributions()
        assert [*found["numpy"]] == every["numpy"] == ["numpy"]
        assert not read
        # Its distribution has another name.
        assert set(found["yaml"]) == set(every["yaml"]) == {"PyYAML"}
        assert found.get("no_such_package") is None
        assert set(found) == set(every)
        assert len(read) == 1
    assert metadata.packages_distributions is read_all
