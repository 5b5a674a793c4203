"""Between text and token ids for one job: the same on the driver and on every worker."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchrun.engine import seeds
from batchrun.engine.protocol import EngineSpec, Request, RowSampling, Sampling, TokenTables
from batchrun.errors import ModelError, first_line
from batchrun.job.job import Job
from batchrun.model.folder import ModelFolder, context_length
from batchrun.model.light import without_warnings
from batchrun.model.tokenizer import load_tokenizer, stop_token_ids
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.reasoning import Reasoning, find_reasoning
from batchrun.prompt.row_settings import RowSettingsReader, row_columns
from batchrun.prompt.scoring import ChoiceScoring, ColumnChoices, ColumnScoring, Scoring
from batchrun.prompt.tokens import Prompt, PromptBuilder, unguarded
from batchrun.structured.answer_format import AnswerFormat
from batchrun.structured.thinking import begins_with_space, behind_thoughts, white_tokens
from batchrun.structured.tokens import token_automaton
from batchrun.structured.vocabulary import read_vocabulary

# Where a model's config names no limit: bounds memory, and no prompt of a sane job reaches it.
UNBOUNDED_CONTEXT = 1 << 20


@dataclass(frozen=True)
class PromptCodec:
    """Between text and token ids for one job: the same on the driver and on every worker."""

    builder: PromptBuilder
    detokenizer: Detokenizer
    engine: EngineSpec
    reasoning: Reasoning | None = None
    answers: AnswerFormat | None = None


def request_of(
    number: int, prompt: Prompt, row_seed: int, max_new_tokens: int, spec: EngineSpec, sample: int = 0
) -> Request:
    """What an engine gets of a row's `sample`, with the row's settings or with the job's."""
    own, sampling = prompt.settings, spec.sampling
    row_seed = seeds.of_sample(row_seed, sample)
    request = Request(number, prompt.token_ids, max_new_tokens, row_seed)
    if own is not None:
        request.max_new_tokens, request.adapter = own.max_new_tokens, own.adapter
        request.row_seed = seeds.of_seed(row_seed, own.seed, sampling.seed)
        if sampling.by_row:
            request.sampling = RowSampling(own.temperature, own.top_p, own.stop)
    if spec.answers is not None and prompt.is_reasoning:
        request.answer_state = spec.answers.thinking
    elif spec.answers is not None and prompt.is_answering:
        request.answer_state = spec.answers.answering
    return request


def open_codec(job: Job, model: ModelFolder, schema: pa.Schema) -> PromptCodec:
    """Loads the tokenizer and compiles the prompt.

    Raises:
        Refused: a template that is wrong, columns that are missing, a tokenizer that cannot do what the job asks.
    """
    tokenizer = load_tokenizer(model, job.model)
    config = _config(model, job)
    context = context_length(config) or UNBOUNDED_CONTEXT
    stop_ids = stop_token_ids(model, tokenizer)
    generation = job.generation.defaults
    detokenizer = Detokenizer(tokenizer, generation.stop, stop_ids)
    answers, reasoning = job.answer.format, None
    if job.answer.reasoning is not None:
        reasoning = find_reasoning(job.answer.reasoning_markers, tokenizer, detokenizer)
        if answers is not None:
            reasoning = _before_answers(reasoning, answers, model.tokenizer_path)
    has_own = bool(row_columns(job.generation, job.model))
    own = RowSettingsReader(job.generation, job.model, schema, context) if has_own else None
    scoring = _scoring(job, model, tokenizer, detokenizer, config, schema, stop_ids)
    new_tokens = generation.max_new_tokens if scoring is None else 1
    builder = PromptBuilder(job.prompt, tokenizer, context, new_tokens, schema, reasoning, own, scoring)
    spec = _engine_spec(job, model, context, stop_ids)
    if answers is not None and scoring is None:
        tables = _token_tables(answers, reasoning, tokenizer, config, stop_ids, model.tokenizer_path)
        spec = replace(spec, answers=tables)
    return PromptCodec(builder, detokenizer, spec, reasoning, answers)


def _scoring(
    job: Job,
    model: ModelFolder,
    tokenizer: Any,
    detokenizer: Detokenizer,
    config: Any,
    schema: pa.Schema,
    stop_ids: tuple[int, ...],
) -> Scoring | None:
    """What the job scores in place of generating."""
    answer = job.answer
    if not answer.is_scored:
        return None
    if getattr(config, "is_encoder_decoder", False):
        what = f"answer.{answer.scored_by} needs a model without an encoder"
        raise ModelError(what, model.path, "use a causal language model")
    encoder = Encoder(tokenizer)
    guard = encoder.special.guard if job.prompt.special_tokens == "text" else unguarded
    if answer.score is not None:
        return ColumnScoring(answer.score, encoder, schema, guard)
    # A model may have fewer logits than its tokenizer has tokens.
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    ends = [i for i in stop_ids if size is None or i < size]
    where = model.tokenizer_path
    if isinstance(answer.choices, list):
        return ChoiceScoring(answer.choices, encoder, detokenizer, ends, where)

    def of_a_row(texts: Sequence[str]) -> ChoiceScoring:
        return ChoiceScoring(texts, encoder, detokenizer, ends, where, guard)

    assert answer.choices is not None
    return ColumnChoices(answer.choices.column, schema, of_a_row)


def _before_answers(reasoning: Reasoning, answers: AnswerFormat, where: str) -> Reasoning:
    """The same where answers are kept to a form."""
    for marker in (reasoning.opening, reasoning.closing):
        if not marker.exact:
            raise ModelError(
                f"its tokenizer has no tokens for {marker.text!r}, which reasoning before a schema, regex or choices "
                "needs",
                where,
                "set answer.reasoning_markers, or leave answer.reasoning out",
            )
    return replace(reasoning, of_tokens=True, keeps_space=begins_with_space(answers.automaton))


def _token_tables(
    answers: AnswerFormat,
    reasoning: Reasoning | None,
    tokenizer: Any,
    config: Any,
    stop_ids: tuple[int, ...],
    where: str,
) -> TokenTables:
    vocabulary = read_vocabulary(tokenizer, where)
    # A model may have fewer logits than its tokenizer has tokens.
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    vocabulary = vocabulary if size is None else vocabulary.cut(size)
    ends = [i for i in stop_ids if size is None or i < size]
    made = token_automaton(answers.automaton, vocabulary, ends, where)
    if reasoning is not None:
        white = white_tokens(vocabulary)
        white &= not reasoning.keeps_space
        made = behind_thoughts(
            made, reasoning.opening.token_ids, reasoning.closing.token_ids, ends, white, where
        )
    digest = hashlib.sha256(made.token_class.tobytes() + made.next_state.tobytes()).hexdigest()
    return TokenTables(
        made.token_class, made.next_state, made.start, digest, made.only, made.thinking, made.answering
    )


def _config(model: ModelFolder, job: Job) -> Any:
    from transformers import AutoConfig

    try:
        with without_warnings():
            config: Any = AutoConfig.from_pretrained(
                model.path, trust_remote_code=job.model.trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ModelError(
            f"its config cannot be read ({reason})", model.path, "check config.json and transformers' version"
        ) from None
    return config


def _engine_spec(job: Job, model: ModelFolder, context: int, stop_ids: tuple[int, ...]) -> EngineSpec:
    generation, shared = job.generation, job.generation.defaults
    sampling = Sampling(
        temperature=shared.temperature,
        top_p=shared.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        stop=shared.stop,
        seed=shared.seed,
        logprobs=job.answer.logprobs,
        by_row=tuple(name for name in ("temperature", "top_p", "stop") if name in generation.columns),
    )
    return EngineSpec(
        kind=job.engine.kind,
        model_path=model.path,
        tokenizer_path=model.tokenizer_path,
        dtype=job.model.dtype,
        quantization=job.model.quantization,
        adapter=model.adapter,
        adapters=tuple(folder for _, folder in model.adapters),
        cache_dtype=job.engine.cache_dtype,
        device="auto",
        trust_remote_code=job.model.trust_remote_code,
        allow_pickle=job.model.allow_pickle,
        sampling=sampling,
        stop_token_ids=stop_ids,
        max_context=context,
        options=job.engine.model_dump(exclude={"kind", "gpus", "cache_dtype"}),
        # "auto" is settled before a run hands the job out.
        gpus=1 if job.engine.gpus == "auto" else job.engine.gpus,
    )
