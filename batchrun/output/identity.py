"""What an output is made of, pinned by the first run into it; a run of anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from batchrun.errors import ChangedError, OutputError
from batchrun.hashing import stable_hash
from batchrun.output import document
from batchrun.output.document import Damaged
from batchrun.output.layout import JOB
from batchrun.storage import Folder, NotFound

# Of the files under _job/ and the parts' metadata. A batchrun that writes them differently counts it up.
FORMAT = 2

# Characters of a value that a difference shows, and of them before what differs.
SHOWN, CONTEXT = 60, 20

FIX = (
    "use another output.path, or empty this one with `batchrun clean --all` and the job file it was made with"
)
DAMAGED_FIX = "restore it, or use another output.path"


@dataclass(frozen=True, slots=True)
class Identity:
    """`settings` are the job's deciding ones as they are written (no place, no secret), `job_hash` covers their
    values and the model.

    `plan_hash` is the first plan's, where an output has several. `model` is the model's name as it is written, with
    those of adapters.
    `from_environment` has a digest of each setting whose value is not shown in `settings`, since `${NAME}` is. Both
    are empty in outputs of earlier versions, which wrote the values themselves.
    """

    plan_hash: str
    job_hash: str
    settings: dict[str, Any]
    model_fingerprint: str
    batchrun_version: str
    format: int = FORMAT
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    model: str = ""
    from_environment: dict[str, str] = field(default_factory=dict)


def digests(values: dict[str, Any], written: dict[str, Any]) -> dict[str, str]:
    """Those of the settings' `values` that are not what is `written`, as `Identity.from_environment` has them."""
    shown = dict(_flat(written))
    return {key: stable_hash(value) for key, value in _flat(values) if shown.get(key) != value}


def pin(folder: Folder, identity: Identity) -> Identity:
    """Writes job.json if there is none; the identity that is pinned now, this one or another.

    Raises:
        OutputError: job.json is damaged.
    """
    if folder.put_if_absent(JOB, document.encode(asdict(identity))):
        return identity
    return read(folder) or identity


def refuse_other(
    pinned: Identity,
    now: Identity,
    output: str,
    input_changes: Callable[[], Iterable[str]] = tuple,
    retried: Callable[[], Iterable[Identity]] = tuple,
) -> None:
    """Compares a job with the one that the output is pinned to.

    `retried` gives the jobs of retries, which were recorded and are as good as the first one, and `input_changes` lines
    that say how the inputs differ. Each is called only where there is a difference.

    Raises:
        ChangedError: inputs, settings or model differ from those pinned; lists each difference.
    """
    if pinned.job_hash != now.job_hash:
        pinned = next((one for one in retried() if one.job_hash == now.job_hash), pinned)
    lines = list(changes(pinned, now).values())
    if pinned.plan_hash != now.plan_hash:
        inputs = f"inputs: {_shown(pinned.plan_hash)} -> {_shown(now.plan_hash)}"
        lines += list(input_changes()) or [inputs]
    if lines:
        raise ChangedError(f"it holds answers of another job ({'; '.join(lines)})", output, FIX)


def read(folder: Folder) -> Identity | None:
    """The pinned identity, None where nothing was ever run.

    Raises:
        OutputError: job.json is damaged.
        ChangedError: another version of batchrun wrote it in another format.
    """
    where = folder.where(JOB)
    try:
        values = document.decode(folder.read(JOB))
        if values["format"] != FORMAT:
            writer = f"batchrun {values['batchrun_version']}"
            raise ChangedError(
                f"written by {writer} in format {values['format']}",
                where,
                f"run {writer}, or use another output.path",
            )
        return Identity(**{f.name: values[f.name] for f in fields(Identity) if f.name in values})
    except NotFound:
        return None
    except (Damaged, KeyError, TypeError) as error:
        raise OutputError(f"damaged ({error})", where, DAMAGED_FIX) from error


def changes(old: Identity, new: Identity) -> dict[str, str]:
    """What differs between two jobs, their inputs aside: a line for each setting, and for the `model`."""
    found = settings_changes(old, new.settings, new.from_environment)
    if old.model_fingerprint != new.model_fingerprint:
        found["model"] = f"model: {_model_change(old, new)}"
    elif old.job_hash != new.job_hash and not found:
        found["job"] = f"job: {_shown(old.job_hash)} -> {_shown(new.job_hash)}"
    return found


def settings_changes(
    old: Identity, written: dict[str, Any], from_environment: dict[str, str]
) -> dict[str, str]:
    """What differs between the pinned settings and those of a job, which are as for an `Identity`."""
    before, after = dict(_flat(old.settings)), dict(_flat(written))

    def differs(key: str) -> bool:
        was = old.from_environment.get(key) or stable_hash(before.get(key))
        return was != (from_environment.get(key) or stable_hash(after.get(key)))

    return {
        key: _setting_change(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if differs(key)
    }


def _model_change(old: Identity, new: Identity) -> str:
    prints = f"{_shown(old.model_fingerprint)} -> {_shown(new.model_fingerprint)}"
    if not (old.model and new.model):
        return prints
    if old.model != new.model:
        return _change(old.model, new.model)
    return f"{new.model} has other files ({prints})"


def _setting_change(key: str, before: Any, after: Any) -> str:
    if before == after:
        return f"{key}: {_shown(after)} has another value in the environment"
    return f"{key}: {_change(before, after)}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _change(old: Any, new: Any) -> str:
    """Two values; long ones from a little before the first character that differs."""
    before, after = _text(old), _text(new)
    skipped = 0
    if max(len(before), len(after)) > SHOWN:
        pairs = zip(before, after, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
        skipped = max(0, same - CONTEXT)
    lead = "..." if skipped else ""
    return f"{lead}{_shown(before[skipped:])} -> {lead}{_shown(after[skipped:])}"


def _shown(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
