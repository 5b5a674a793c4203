"""Everything that is found out before a GPU is asked for: the plan, the model's folder, the prompt, the identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

import batchrun
from batchrun.dataset.patience import patiently
from batchrun.dataset.plan import (
    Partition,
    Plan,
    carried_columns,
    check_output_names,
    extend,
    joined,
    make_plan,
)
from batchrun.dataset.reader import Batch, read_partition
from batchrun.dataset.source import DataFile
from batchrun.engine.protocol import EngineSpec, Sampling
from batchrun.errors import ModelError, OutputError
from batchrun.job import Job, stable_hash
from batchrun.model import ModelFolder, context_length, load_tokenizer, resolve, stop_token_ids
from batchrun.output import failed, identity, plans
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.template import prompt_columns
from batchrun.prompt.tokens import PromptBuilder, check_sample
from batchrun.storage import Folder

# Rows read at once. With a damaged page, so many in front of it may be lost as well.
BATCH_ROWS, SALVAGE_ROWS = 1024, 64
# Where a model's config names no limit: bounds memory, and no prompt of a sane job reaches it.
UNBOUNDED_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Texts:
    """Between text and token ids for one job: the same on the driver and on every worker."""

    builder: PromptBuilder
    detokenizer: Detokenizer
    engine: EngineSpec


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
        return layout_of(self.plans)

    @cached_property
    def identity(self) -> Identity:
        settings = self.job.deciding()
        return Identity(
            plan_hash=self.plans[0].hash,
            job_hash=stable_hash([settings, self.model.fingerprint]),
            settings=settings,
            model_fingerprint=self.model.fingerprint,
            batchrun_version=batchrun.__version__,
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
    if made:
        builder = prepared.texts.builder
        check_sample(builder, all_rows(job, made[0], builder.columns))
    return prepared


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
        return [make_plan(job.input, needed, output.rows_per_part, output.bytes_per_part)]
    new = extend(stored, job.input, needed, output.rows_per_part, output.bytes_per_part)
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


def layout_of(plans: Sequence[Plan]) -> Layout:
    """The keys of an output with these plans."""
    return Layout.of([(plan.hash, len(plan.partitions)) for plan in plans])


def open_texts(job: Job, model: ModelFolder, schema: pa.Schema) -> Texts:
    """Loads the tokenizer and compiles the prompt.

    Raises:
        Refused: a template that is wrong, columns that are missing, a tokenizer that cannot do what the job asks.
    """
    tokenizer = load_tokenizer(model, job.model)
    context = _context(model, job)
    stop_ids = stop_token_ids(model, tokenizer)
    builder = PromptBuilder(job.prompt, tokenizer, context, job.generation.max_new_tokens, schema)
    detokenizer = Detokenizer(tokenizer, job.generation.stop, stop_ids)
    return Texts(builder, detokenizer, _engine_spec(job, model, context, stop_ids))


def read_rows(
    job: Job, schema: pa.Schema, partition: Partition, files: Mapping[int, DataFile], columns: Sequence[str]
) -> Iterator[Batch]:
    """A partition's input rows in order, `columns` only, as the job filters and casts them.

    Rows of a page that cannot be decoded, read twice, are nulls with a fault.
    """
    settings = job.input

    def read(salvage: bool) -> Iterator[Batch]:
        return read_partition(
            partition.slices,
            files,
            schema,
            columns,
            settings.filters,
            settings.cast,
            settings.storage_options,
            batch_rows=SALVAGE_ROWS if salvage else BATCH_ROWS,
            salvage=salvage,
        )

    return patiently(read, job.input.paths[0])


def rows_of(job: Job, plan: Plan, partition: Partition, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The same where the whole plan is at hand, without the rows' ids."""
    batches = read_rows(job, plan.schema, partition, plan.files_of(partition), columns)
    return (batch.records for batch in batches)


def places_of(
    job: Job, schema: pa.Schema, partition: Partition, files: Mapping[int, DataFile]
) -> Iterator[pa.RecordBatch]:
    """Where in the input a partition's rows stand, in order (schema `failed.PLACE`)."""
    for batch in read_rows(job, schema, partition, files, ()):
        rows = len(batch.places)
        columns = [
            pa.repeat(pa.scalar(batch.file), rows),
            pa.repeat(pa.scalar(batch.row_group, pa.int32()), rows),
            pa.array(batch.places),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=failed.PLACE)


def places_in(job: Job, plan: Plan) -> failed.Places:
    """`places_of` by a partition's number in the plan."""

    def places(index: int) -> Iterator[pa.RecordBatch]:
        partition = plan.partitions[index]
        return places_of(job, plan.schema, partition, plan.files_of(partition))

    return places


def all_rows(job: Job, plan: Plan, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of every partition that can be read, in the plan's order; take as many as are wanted."""
    for partition in plan.partitions:
        batches = read_rows(job, plan.schema, partition, plan.files_of(partition), columns)
        yield from (batch.records for batch in batches if batch.fault is None)


def _context(model: ModelFolder, job: Job) -> int:
    from transformers import AutoConfig  # seconds: not on the event loop that imports a worker's task

    try:
        config: Any = AutoConfig.from_pretrained(
            model.path, trust_remote_code=job.model.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"its config cannot be read ({reason})", model.path, "check config.json and transformers' version"
        ) from None
    return context_length(config) or UNBOUNDED_CONTEXT


def _engine_spec(job: Job, model: ModelFolder, context: int, stop_ids: tuple[int, ...]) -> EngineSpec:
    generation = job.generation
    sampling = Sampling(
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        stop=tuple(generation.stop),
        seed=generation.seed,
    )
    return EngineSpec(
        kind=job.engine.kind,
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=job.model.dtype,
        device="auto",
        trust_remote_code=job.model.trust_remote_code,
        allow_pickle=job.model.allow_pickle,
        sampling=sampling,
        stop_token_ids=stop_ids,
        max_context=context,
        options=job.engine.model_dump(exclude={"kind"}),
    )
