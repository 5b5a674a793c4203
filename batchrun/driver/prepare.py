"""Everything that is found out before a GPU is asked for: the plan, the model's folder, the prompt, the identity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from batchrun.dataset.plan import (
    Plan,
    carried_columns,
    check_output_names,
    extend,
    folders_of,
    joined,
    make_plan,
)
from batchrun.dataset.rows import all_rows
from batchrun.errors import InputError, OutputError
from batchrun.hashing import stable_hash
from batchrun.job.job import Job
from batchrun.model.folder import ModelFolder, resolve
from batchrun.output import failed, identity, plans
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.prompt.codec import Texts, open_texts
from batchrun.prompt.template import prompt_columns
from batchrun.prompt.tokens import check_sample
from batchrun.storage import Folder
from batchrun.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A job that was checked: what the driver hands out, what workers need, and what pins the output.

    `plans` are all of the output's, of which the first `known` were read from it; `plan` is all of them as one.
    """

    job: Job
    plans: list[Plan]
    known: int
    model: ModelFolder
    texts: Texts

    @cached_property
    def plan(self) -> Plan:
        return joined(self.plans)

    @cached_property
    def folder(self) -> Folder:
        return open_folder(self.job)

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.plans, self.job.output.partition_by)

    @cached_property
    def identity(self) -> Identity:
        settings = self.job.deciding()
        return Identity(
            plan_hash=self.plans[0].hash,
            job_hash=stable_hash([settings, self.model.fingerprint]),
            settings=settings,
            model_fingerprint=self.model.fingerprint,
            batchrun_version=__version__,
        )


def prepare(job: Job) -> Prepared:
    """Reads footers, resolves the model's folder, compiles the prompt and tries it on the first rows.

    With `input.since` the plans that the output has are read too, and only files that none of them took are planned.
    Writes nothing but the local cache of a model that lies on a remote store.

    Raises:
        Refused: the first thing wrong with the job, its input or its model, each with the fix.
    """
    stored = plans.read(open_folder(job)) if job.input.since else []
    made = _plan(job, stored)
    prepared = _prepare(job, [*stored, *made], len(stored))
    if not prepared.plan.rows:
        _empty(job)
    if made:
        builder = prepared.texts.builder
        check_sample(builder, all_rows(job, made[0], builder.columns))
    return prepared


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
    which may be mended for failed rows alone.

    Raises:
        Refused: as `prepare`.
        OutputError: nothing was ever run into this output, or its plans are damaged.
    """
    folder = open_folder(job)
    stored = [] if identity.read(folder) is None else plans.read(folder)
    if not stored:
        raise OutputError("no run was ever started here", folder.name, "start one with `batchrun run`")
    return _prepare(job, stored, len(stored))


def _plan(job: Job, stored: Sequence[Plan]) -> list[Plan]:
    needed, output = prompt_columns(job.prompt), job.output
    if not stored:
        return [
            make_plan(job.input, needed, output.rows_per_part, output.bytes_per_part, output.partition_by)
        ]
    new = extend(stored, job.input, needed, output.rows_per_part, output.bytes_per_part, output.partition_by)
    return [] if new is None else [new]


def _prepare(job: Job, plans: list[Plan], known: int) -> Prepared:
    schema = plans[0].schema
    carried = carried_columns(job.input, schema)
    check_output_names(carried, job.output)
    failed.refuse_taken(carried, job.output)
    model = resolve(job.model)
    return Prepared(job, plans, known, model, open_texts(job, model, schema))


def open_folder(job: Job) -> Folder:
    return Folder(job.output.path, job.output.storage_options)


def layout_of(plans: Sequence[Plan], partition_by: Sequence[str]) -> Layout:
    """The keys of an output with these plans."""
    folders = folders_of(joined(plans), partition_by)
    return Layout.of([(plan.hash, len(plan.partitions)) for plan in plans], folders)
