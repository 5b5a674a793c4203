"""What one `batchrun retry` is: which failed rows it runs again, of which parts, and with which job.

A retry may be of a changed job, since that is how most causes are fixed, but two jobs never meet in one output
unseen. Three kinds of settings:

- what only decides whether a row gets an answer (`FREE`: truncation, empty prompts, limits) may change;
- the template, the sampling or the model may change only where the person names the key (`allow`);
- what decides which rows and columns a part has (`FIXED`: input, output, a column of reasoning, samples) never changes.

Each difference from the job that the output was begun with is recorded here and in the manifest, together with the
whole identity of the changed job, which a later run of it is measured by.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from batchrun.errors import ChangedError, OutputError
from batchrun.output import document, identity
from batchrun.output.document import Damaged
from batchrun.output.identity import Identity
from batchrun.output.layout import RETRIES, retry_key
from batchrun.output.part import Summary
from batchrun.storage import Folder

FREE = ("prompt.truncate", "prompt.empty", "prompt.max_bytes", "generation.max_new_tokens")
FIXED = ("input", "output", "answer.reasoning", "generation.samples")

READERS = 8


@dataclass(frozen=True, slots=True)
class Retry:
    """The `number`-th retry of an output: rows failed with one of `errors` (with any, where it is empty) in the
    first `partitions` parts, under `identity`, which differs by `changes` from the job first pinned."""

    number: int
    errors: list[str]
    partitions: int
    changes: list[str]
    identity: Identity
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def selects(self, code: str) -> bool:
        """Whether rows with this error code are run again."""
        return not self.errors or code in self.errors

    def work(self, summaries: Sequence[Summary]) -> dict[int, int]:
        """What is left to do: how many rows of which partition, told from what the parts say of themselves."""
        found = {}
        for partition, summary in enumerate(summaries[: self.partitions]):
            rows = sum(count for code, count in summary.errors.items() if self.selects(code))
            if rows and summary.generation < self.number:
                found[partition] = rows
        return found


def read(folder: Folder) -> list[Retry]:
    """Every retry that was begun, in order.

    Raises:
        OutputError: a record is damaged.
    """
    keys = sorted(folder.list(RETRIES), key=lambda key: (len(key), key))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda key: _read(folder, key), keys))


def begin(
    folder: Folder,
    now: Identity,
    errors: Iterable[str],
    allow: Sequence[str],
    summaries: Sequence[Summary],
    finished: Container[int],
) -> Retry | None:
    """The retry to go on with: the last one, where it asks for the same and is not among those that the manifest
    calls `finished`; else a new one, recorded here.

    None where no row failed with any of `errors`; then nothing is written. `allow` names settings, or sections
    of them, that may differ from the pinned job.

    Raises:
        ChangedError: the job differs in a setting that must not change, or was not allowed to.
        OutputError: no run was ever started here.
    """
    pinned = identity.read(folder)
    if pinned is None:
        raise OutputError("no run was ever started here", folder.name, "start one with `batchrun run`")
    changes = _permitted(folder, pinned, now, allow)
    wanted = sorted(set(errors))
    earlier = read(folder)
    if earlier:
        last = earlier[-1]
        same = (last.errors, last.identity.job_hash) == (wanted, now.job_hash)
        if same and last.number not in finished:
            return last
    retry = Retry(len(earlier) + 1, wanted, len(summaries), changes, now)
    if not retry.work(summaries):
        return None
    key = retry_key(retry.number)
    if not folder.put_if_absent(key, document.encode(asdict(retry))):
        there = _read(folder, key)
        if there != retry:
            raise ChangedError(
                "another retry was begun just now", folder.name, "retry again to go on with it"
            )
    return retry


def _permitted(folder: Folder, pinned: Identity, now: Identity, allow: Sequence[str]) -> list[str]:
    changed = identity.changes(pinned, now)
    fixed = [line for key, line in changed.items() if _covers(FIXED, key)]
    if fixed:
        raise ChangedError(
            f"a retry cannot change which rows and columns there are ({'; '.join(fixed)})",
            folder.name,
            "set them back, or use another output.path",
        )
    silent = {key: line for key, line in changed.items() if not _covers((*FREE, *allow), key)}
    if silent:
        asked = " ".join(f"--allow {key}" for key in silent)
        raise ChangedError(
            f"answers of two different jobs would stand in one output ({'; '.join(silent.values())})",
            folder.name,
            f"set them back, or say that this is meant with {asked}",
        )
    return list(changed.values())


def _covers(names: Iterable[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _read(folder: Folder, key: str) -> Retry:
    try:
        values = document.decode(folder.read(key))
        return Retry(**{**values, "identity": Identity(**values["identity"])})
    except (Damaged, KeyError, TypeError) as error:
        where = folder.where(key)
        raise OutputError(f"damaged ({error})", where, "restore it, or use another output.path") from error
