"""A run sees all workers at each look, whatever its client asks the scheduler for itself meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import Client

from batchrun.driver.workers import look_at


def test_a_look_of_the_client_at_nobody_takes_no_worker_away(
    cluster: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = cluster._update_scheduler_info

    async def update_and_again(n_workers: int = 0) -> None:
        await update(n_workers)
        # As the client does by itself every two seconds.
        await update()

    monkeypatch.setattr(cluster, "_update_scheduler_info", update_and_again)
    assert cluster.scheduler_info(n_workers=-1)["workers"] == {}
    assert len(look_at(cluster, {})) == 1


def test_a_scheduler_that_does_not_answer_leaves_what_was_known(
    cluster: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, Any] = {"tcp://10.0.0.1:9000": {}}

    def silent(*call: Any, **words: Any) -> None:
        raise OSError("connection closed")

    monkeypatch.setattr(cluster, "sync", silent)
    assert look_at(cluster, known) is known
