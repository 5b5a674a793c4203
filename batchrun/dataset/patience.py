"""Reading on where a page is damaged or a store is busy."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator

from batchrun.dataset.reader import RowBatch
from batchrun.errors import BatchrunError, CorruptInput, StorageError, one_line
from batchrun.storage.deadline import pause, told_to_stop
from batchrun.storage.faults import is_transient

log = logging.getLogger(__name__)

# Seconds without a batch before a busy store is given up.
PATIENCE = 300.0
# Seconds; the n-th wait is a random one up to FIRST_WAIT * 2**n.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0


def read_with_retries(read: Callable[[bool], Iterator[RowBatch]], where: str) -> Iterator[RowBatch]:
    """A partition's batches; `read(salvage)` starts reading them from the first, as `read_partition` does.

    A page that cannot be decoded is read once more, and then its slice salvaged. While the store is only busy, waits
    and reads again what is left.

    Raises:
        StorageError: the store kept failing for minutes, or in a way that waiting cannot help.
        ChangedError, InputError: as `read_partition`.
    """
    done, salvage, waits, last = 0, False, 0, time.monotonic()
    while True:
        try:
            for batch in read(salvage):
                behind = batch.first + batch.records.num_rows
                if behind > done:
                    batch = _from(batch, done)
                    done, waits, last = behind, 0, time.monotonic()
                    yield batch
            return
        except CorruptInput as error:
            if salvage:
                raise
            log.warning("%s; it is read once more", error)
            salvage = True
        except BatchrunError:
            raise
        except Exception as error:
            # Built-in errors but OSError are bugs of the program, and stay what they are.
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise
            given_up = time.monotonic() - last > PATIENCE or told_to_stop()
            if not is_transient(error) or given_up:
                raise StorageError(
                    f"the input cannot be read ({one_line(error)})", where, "run again to go on from here"
                ) from error
            log.warning("%s: %s, reading on", where, one_line(error))
            pause(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**waits)))
            waits += 1


def _from(batch: RowBatch, first: int) -> RowBatch:
    """The batch without the rows before `first`."""
    return batch.from_row(first - batch.first) if first > batch.first else batch
