"""The plans of an output, numbered in the order in which they were made: one, or one more whenever its input grew."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from batchrun.dataset.plan import Plan, difference
from batchrun.errors import ChangedError
from batchrun.output.layout import PLANS, plan_key
from batchrun.storage import Folder

READERS = 8


def read(folder: Folder) -> list[Plan]:
    """Every plan of the output, in order; empty where nothing was ever run.

    Raises:
        OutputError: one is damaged.
    """
    # Five digits or more: the longer number is the later one.
    keys = sorted(folder.list(PLANS), key=lambda key: (len(key), key))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda key: Plan.from_parquet(folder.read(key)), keys))


def add(folder: Folder, plans: Sequence[Plan], known: int) -> None:
    """Writes those of an output's plans that are not there yet. The first `known` were compared already.

    A plan's number is its key, put if absent: of two runs that plan other files at once, one is refused.

    Raises:
        ChangedError: another plan stands in the place of one of these, or after them.
    """
    there = folder.list(PLANS)
    for number, plan in enumerate(plans):
        key = plan_key(number)
        if key in there and number < known:
            continue
        if key in there or not folder.put_if_absent(key, plan.to_parquet()):
            other = Plan.from_parquet(folder.read(key))
            if other.hash != plan.hash:
                changes = "; ".join(difference(other, plan))
                raise _taken(folder, f"another run planned other inputs ({changes})")
    if len(there) > len(plans):
        raise _taken(folder, f"it has {len(there)} plans where this run knows {len(plans)}")


def _taken(folder: Folder, what: str) -> ChangedError:
    return ChangedError(
        what,
        folder.name,
        "run again to take up what the other run planned; if that says the same, "
        "`batchrun clean --all` begins anew",
    )
