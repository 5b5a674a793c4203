"""Asking a store again while it is only busy."""

from __future__ import annotations

import logging

import tenacity

from batchrun.errors import StorageError, one_line
from batchrun.storage.deadline import pause, told_to_stop
from batchrun.storage.faults import is_transient

log = logging.getLogger(__name__)


class _Told(tenacity.stop.stop_base):
    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return told_to_stop()


def back_off(where: str, patience: float, first_wait: float, longest_wait: float) -> tenacity.Retrying:
    """Calls what it is given again for `patience` seconds as long as its errors are transient, and lets the last one
    through. The n-th wait is a random one up to first_wait * 2**n seconds, never above `longest_wait`. Once told to
    stop, nothing is tried again."""

    def note(state: tenacity.RetryCallState) -> None:
        if state.outcome and (error := state.outcome.exception()):
            log.warning("%s: %s, trying again", where, one_line(error))

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=first_wait, max=longest_wait),
        stop=tenacity.stop_any(tenacity.stop_after_delay(patience), _Told()),
        sleep=pause,
        before_sleep=note,
        reraise=True,
    )


def kept_failing(error: Exception, where: str) -> StorageError:
    """What a transient error is called once patience has run out."""
    return StorageError(f"the store kept failing ({one_line(error)})", where, "run again to go on from here")
