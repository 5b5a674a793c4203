"""Suspects that are tried, each alone on a worker."""

from __future__ import annotations

from collections.abc import Collection

from distributed import Client, Future

from batchrun.driver.lost_attempts import IsolatedAttempt, LostAttemptPolicy
from batchrun.driver.window import Window
from batchrun.worker.task import examine, run_partition


class Trials:
    """`running` are those tasks in the window that try a suspect."""

    def __init__(self, policy: LostAttemptPolicy, window: Window) -> None:
        self.running: dict[Future, IsolatedAttempt] = {}
        self._policy, self._window = policy, window

    def begin(self, client: Client, workers: Collection[str]) -> None:
        """Begins as many as there are workers for, once nothing else is in flight."""
        if len(self._window.tasks) > len(self.running):
            return
        for future, isolated in list(self.running.items()):
            if isolated.worker not in workers and not future.done():
                # It left in peace, and nothing can be said of the rows.
                self._window.tasks.pop(future)
                del self.running[future]
                future.cancel()
        for isolated in list(self._policy.isolated_attempts(self.running.values(), workers)):
            self.go_on(client, isolated)

    def go_on(self, client: Client, isolated: IsolatedAttempt) -> None:
        """The next step of a trial."""
        work = examine if isolated.rows is None else run_partition
        task = self._policy.task(isolated)
        future = self._window.submit(client, [isolated.partition], work, task, workers=[isolated.worker])
        self.running[future] = isolated
