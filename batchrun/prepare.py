"""Everything that is found out before a GPU is asked for: the plan, the model's folder, the prompt, the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchrun.dataset.plan import Plan, make_plan
from batchrun.dataset.reader import read_partition
from batchrun.engine.protocol import EngineSpec, Sampling
from batchrun.errors import OutputError
from batchrun.job import OUTPUT_COLUMNS, Job, stable_hash
from batchrun.model import ModelFolder, context_length, load_tokenizer, resolve, stop_token_ids
from batchrun.output.identity import Identity
from batchrun.prompt.tokens import PromptBuilder, check_sample

if TYPE_CHECKING:
    import pyarrow as pa

# Without a limit in the model's config, a context that bounds memory and that no prompt of a sane job reaches.
UNBOUNDED_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was checked: what the driver hands out, what workers need, and what pins the output."""

    job: Job
    plan: Plan
    model: ModelFolder
    builder: PromptBuilder
    context: int
    engine: EngineSpec
    identity: Identity

    @property
    def carried(self) -> list[str]:
        """The input columns that stand in the output, in the input's order."""
        return carried_columns(self.job, self.plan.schema)


def prepare(job: Job) -> Prepared:
    """Reads footers, resolves the model's folder, compiles the prompt and tries it on the first rows.

    Writes nothing but the local cache of a model that lies on a remote store.

    Raises:
        Refused: the first thing wrong with the job, its input or its model, each with the fix.
    """
    plan = make_plan(job)
    _check_output_columns(job, plan.schema)
    model = resolve(job.model)
    builder, context = build_prompts(job, model, plan.schema)
    check_sample(builder, sample_batches(job, plan, builder.columns, rows=100))
    return Prepared(
        job, plan, model, builder, context, engine_spec(job, model, context), identify(job, plan, model)
    )


def build_prompts(job: Job, model: ModelFolder, schema: pa.Schema) -> tuple[PromptBuilder, int]:
    """The job's prompt builder and the context (tokens) it fills; the same on the driver and on every worker."""
    context = context_length(model) or UNBOUNDED_CONTEXT
    tokenizer = load_tokenizer(model, job.model)
    return PromptBuilder(job.prompt, tokenizer, context, job.generation.max_new_tokens, schema), context


def carried_columns(job: Job, schema: pa.Schema) -> list[str]:
    return schema.names if job.input.columns is None else [n for n in schema.names if n in job.input.columns]


def sample_batches(job: Job, plan: Plan, columns: list[str], rows: int):  # type: ignore[no-untyped-def]
    """Batches of the first `rows` rows of the plan, over as many partitions as it takes."""
    left = rows
    for partition in plan.partitions:
        for batch in read_partition(plan.task(partition), columns, job.input, batch_rows=min(left, 1024)):
            yield batch
            left -= batch.num_rows
            if left <= 0:
                return


def engine_spec(job: Job, model: ModelFolder, context: int) -> EngineSpec:
    generation = job.generation
    return EngineSpec(
        kind=job.engine.kind,
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=job.model.dtype,
        device="auto",
        trust_remote_code=job.model.trust_remote_code,
        sampling=Sampling(
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
            stop=tuple(generation.stop),
            seed=generation.seed,
        ),
        stop_token_ids=tuple(stop_token_ids(model)),
        max_context=context,
        options=job.engine.model_dump(exclude={"kind"}),
    )


def identify(job: Job, plan: Plan, model: ModelFolder) -> Identity:
    deciding = job.deciding()
    deciding["model"]["fingerprint"] = model.fingerprint
    return Identity(job_hash=stable_hash(deciding), plan_hash=plan.hash, settings=deciding)


def _check_output_columns(job: Job, schema: pa.Schema) -> None:
    carried = carried_columns(job, schema)
    names = [job.output.column(name) for name in OUTPUT_COLUMNS]
    for standard, name in zip(OUTPUT_COLUMNS, names, strict=True):
        if name in carried:
            free = next(
                c for c in (f"{name}_{i}" if i else f"model_{name}" for i in range(99)) if c not in carried
            )
            raise OutputError(
                f"output column {name!r} is the name of an input column",
                "output.columns",
                f"add `output.columns: {{{standard}: {free}}}`, or leave it out of input.columns",
            )
        if names.count(name) > 1:
            raise OutputError(
                f"two output columns are named {name!r}", "output.columns", "give each its own name"
            )
