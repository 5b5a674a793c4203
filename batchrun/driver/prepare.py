"""Everything that is found out before a GPU is asked for: the plan, the model's folder, the prompt, the identity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from batchrun.dataset.plan import Plan, carried_columns, check_output_names, difference, joined
from batchrun.dataset.planner import extend, make_plan
from batchrun.dataset.rows import all_rows
from batchrun.driver.gpus import gpus_of, with_gpus
from batchrun.driver.overlap import refuse_files_in_output, refuse_overlap
from batchrun.engine.names import refuse_wrong_name
from batchrun.errors import InputError, OutputError, RowFault
from batchrun.hashing import stable_hash
from batchrun.job.job import Job
from batchrun.model.adapter import check_adapter
from batchrun.model.check import check_model
from batchrun.model.folder import ModelFolder, resolve
from batchrun.output import failed_rows, identity, manifest, plans, retry, state
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.output.manifest import Manifest
from batchrun.output.output import Output, layout_of, open_folder
from batchrun.output.state import State
from batchrun.prompt.codec import PromptCodec, open_codec
from batchrun.prompt.row_settings import row_columns
from batchrun.prompt.template import leading_columns, prompt_columns
from batchrun.prompt.tokens import check_sample
from batchrun.storage import Folder
from batchrun.storage.folder import first_contact
from batchrun.version import __version__

log = logging.getLogger(__name__)

# Rows whose prompts tell how long a row is.
MEASURED_ROWS = 64


@dataclass(frozen=True)
class Prepared:
    """A job that was checked: what the driver hands out, what workers need, and what pins the output.

    `plans` are all of the output's, of which the first `known` were read from it; `plan` is all of them as one.
    `pinned` is the identity that the output had then, None where nothing was ever run into it.
    """

    job: Job
    plans: list[Plan]
    known: int
    model: ModelFolder
    pinned: Identity | None

    @cached_property
    def plan(self) -> Plan:
        """All plans of the output as one."""
        return joined(self.plans)

    @property
    def gpus(self) -> int:
        """GPUs of one engine; 1 as long as "auto" is not settled."""
        gpus = self.job.engine.gpus
        return 1 if gpus == "auto" else gpus

    @cached_property
    def codec(self) -> PromptCodec:
        """Opened on first use, which takes a second or more. Raises Refused as `open_codec` does."""
        return open_codec(self.job, self.model, self.plans[0].schema)

    @cached_property
    def folder(self) -> Folder:
        """Where the output is, or will be."""
        return open_folder(self.job)

    @cached_property
    def layout(self) -> Layout:
        """The output's keys."""
        return layout_of(self.plans, self.job.output.partition_by)

    def output(self, pinned: Identity) -> Output:
        """The job's output, with what it is pinned to by now."""
        return Output(self.folder, self.job.output, pinned, self.plan, self.layout)

    @cached_property
    def found(self) -> State:
        """How far the output was when this was first asked: one listing, before whatever a run adds."""
        return state.scan(self.folder, self.layout)

    @cached_property
    def identity(self) -> Identity:
        """What the output is pinned to if this is its first run, and compared with otherwise."""
        settings = self.job.deciding()
        written = self.job.as_written(settings)
        fingerprint = self._fingerprint()
        return Identity(
            plan_hash=self.plans[0].hash,
            job_hash=stable_hash([settings, fingerprint]),
            settings=written,
            from_environment=identity.digests(settings, written),
            model=_model_as_written(self.job),
            model_fingerprint=fingerprint,
            batchrun_version=__version__,
        )

    def _fingerprint(self) -> str:
        """The model's as the output pins it: an output that pinned samples of the same weights goes on with them."""
        pinned = self.pinned
        if pinned is None or pinned.model_fingerprint == self.model.fingerprint:
            return self.model.fingerprint
        known = {
            one.model_fingerprint for one in (pinned, *(past.identity for past in retry.read(self.folder)))
        }
        sampled = self.model.sampled_fingerprint
        return sampled if sampled in known else self.model.fingerprint


def prepare(job: Job) -> Prepared:
    """Everything that a run checks before it writes or generates: `look`, `settle` and `try_prompt`. Raises Refused."""
    prepared = settle(look(job))
    try_prompt(prepared)
    return prepared


def look(job: Job) -> Prepared:
    """Reads footers and resolves the model's folder.

    With `input.since` the plans that the output has are read too, and only files that none of them took are planned.
    Writes nothing but the local cache of a model that lies on a remote store.

    Raises:
        Refused: the first thing wrong with the job, its input or its model, each with the fix.
    """
    refuse_overlap(job)
    if (answers := job.answer.format) is not None and not job.answer.is_scored:
        _ = answers.automaton
    with first_contact():
        stored = plans.read(open_folder(job)) if job.input.since else []
        known = _ordered_before(job) if job.input.order and not job.input.since else None
    planned = _plan(job, stored, known)
    with first_contact():
        pinned = identity.read(open_folder(job))
    made = _as_pinned(job, planned, pinned)
    refuse_files_in_output(job, (file.path for plan in made for file in plan.files))
    prepared = _prepare(job, [*stored, *made], len(stored), pinned)
    if not prepared.plan.rows:
        _empty(job)
    return prepared


def settle(prepared: Prepared) -> Prepared:
    """The same with a job whose `engine.gpus` is a number. Raises JobError as `gpus_of` does."""
    gpus = gpus_of(prepared.job, prepared.model, lambda: row_tokens(prepared))
    return (
        prepared if gpus == prepared.job.engine.gpus else replace(prepared, job=with_gpus(prepared.job, gpus))
    )


def try_prompt(prepared: Prepared) -> None:
    """Opens the tokenizer, compiles the prompt and tries it on the first rows that are new.

    Raises:
        Refused: the first thing wrong with them.
    """
    builder = prepared.codec.builder
    for plan in prepared.plans[prepared.known :]:
        check_sample(builder, all_rows(prepared.job, plan, builder.columns))


@first_contact()
def finished(prepared: Prepared) -> Manifest | None:
    """The manifest of an output that is complete already, for which nothing is to be written, not even a lease.

    Raises:
        ChangedError: the output was made from other inputs or another job.
        OutputError: it has other files, and no run of a job was ever started there; or it is a file.
    """
    folder = prepared.folder
    if prepared.pinned is None:
        # Whatever is in data/ is somebody else's, and so is the folder: not even a plan is left in it.
        prepared.found.refuse_foreign(folder)
        return None
    compare(prepared, prepared.pinned)
    written = manifest.current(folder, lambda: prepared.found)
    return written if written is not None and written.failed_folder == prepared.job.output.failed else None


def compare(prepared: Prepared, pinned: Identity) -> None:
    """Raises ChangedError where the output is of other inputs or of another job, which no retry brought in."""
    folder = prepared.folder

    def input_changes() -> list[str]:
        stored = plans.read(folder)
        return difference(joined(stored), prepared.plan) if stored else []

    def retried() -> list[Identity]:
        return [one.identity for one in retry.read(folder)]

    identity.refuse_other(pinned, prepared.identity, folder.name, input_changes, retried)


def row_tokens(prepared: Prepared) -> float:
    """Tokens of a row, prompt and answer: the first rows' mean prompt, and the longest answer there may be."""
    codec = prepared.codec
    new = prepared.job.generation.defaults.max_new_tokens
    lengths: list[int] = []
    for batch in all_rows(prepared.job, prepared.plan, codec.builder.columns):
        made = codec.builder.build(batch.slice(0, MEASURED_ROWS))
        lengths += [len(prompt) for prompt in made if not isinstance(prompt, RowFault)]
        if len(lengths) >= MEASURED_ROWS:
            break
    longest = codec.engine.max_context
    return min(sum(lengths) / len(lengths) + new, float(longest)) if lengths else float(longest)


def _empty(job: Job) -> None:
    """Warns about an input without any row, or refuses it."""
    what, where = (
        "no row of the input passes the filters" if job.input.filters else "no row is in the input",
        job.input.paths[0],
    )
    if not job.input.allow_empty:
        raise InputError(what, where, "check input.path and input.filters, or set input.allow_empty: true")
    log.warning("%s: %s; input.allow_empty: false refuses that", where, what)


def prepare_again(job: Job) -> Prepared:
    """The same for an output that is there, by its own plans: the input is not looked at, nor the prompt tried,
    which may be fixed for failed rows alone.

    Raises:
        Refused: as `prepare`.
        OutputError: nothing was ever run into this output, or its plans are damaged.
    """
    folder = open_folder(job)
    with first_contact():
        pinned = identity.read(folder)
        stored = [] if pinned is None else plans.read(folder)
    if not stored:
        raise OutputError("no run was ever started here", folder.name, "start one with `batchrun run`")
    return _prepare(job, stored, len(stored), pinned)


def _ordered_before(job: Job) -> Plan | None:
    """The plan that a run of the very settings put in order."""
    pinned = identity.read(open_folder(job))
    settings = job.deciding()
    written = job.as_written(settings)
    if pinned is None or identity.settings_changes(pinned, written, identity.digests(settings, written)):
        return None
    return next(iter(plans.read(open_folder(job))), None)


def _plan(job: Job, stored: Sequence[Plan], known: Plan | None) -> list[Plan]:
    """A plan of the input's files, or of those that none of the `stored` ones took."""
    needed = [
        *prompt_columns(job.prompt),
        *job.answer.read_columns,
        *row_columns(job.generation, job.model).values(),
    ]
    output = job.output
    how = (output.rows_per_part, output.bytes_per_part, output.partition_by, leading_columns(job.prompt))
    if stored:
        new = extend(stored, job.input, needed, *how)
        return [] if new is None else [new]
    return [make_plan(job.input, needed, *how, known)]


def _as_pinned(job: Job, made: list[Plan], pinned: Identity | None) -> list[Plan]:
    """The plan without footers where that is the one the output pinned: a version that knew none began it."""
    if pinned is None or job.input.since or pinned.plan_hash == made[0].hash:
        return made
    earlier = made[0].without_footers()
    return [earlier] if pinned.plan_hash == earlier.hash else made


def _prepare(job: Job, plans: list[Plan], known: int, pinned: Identity | None) -> Prepared:
    # Workers on other machines may have modules that this one lacks.
    if job.cluster.is_local:
        refuse_wrong_name(job.engine.kind)
    schema = plans[0].schema
    carried = carried_columns(job.input, schema)
    check_output_names(carried, job.output)
    failed_rows.refuse_taken(carried, job.output)
    # Its bytes are hashed beside this, and nobody waits for them yet.
    model = resolve(job.model)
    check_model(model.path, job.model)
    for adapter in model.all_adapters:
        check_adapter(adapter, model)
    return Prepared(job, plans, known, model, pinned)


def _model_as_written(job: Job) -> str:
    """Its name, and those of what is merged into it or stands beside it."""
    written = job.as_written()["model"]
    adapters = {"adapter": written.get("adapter"), **(written.get("adapters") or {})}
    return ", ".join([written["name"], *(f"{name} {place}" for name, place in adapters.items() if place)])
