"""Between text and token ids for one job: the same on the driver and on every worker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchrun.engine import seeds
from batchrun.engine.protocol import EngineSpec, Request, RowSampling, Sampling, TokenTables
from batchrun.errors import ModelError, first_line
from batchrun.job.job import Job
from batchrun.model.folder import ModelFolder, context_length, load_tokenizer, stop_token_ids
from batchrun.model.light import without_warnings
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.reasoning import Reasoning, find_reasoning
from batchrun.prompt.row_settings import RowSettingsReader
from batchrun.prompt.scoring import ChoiceScoring, ColumnScoring
from batchrun.prompt.tokens import Prompt, PromptBuilder, unguarded
from batchrun.structured.answer_format import AnswerFormat
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
    choices: ChoiceScoring | None = None


def request_of(
    number: int, prompt: Prompt, row_seed: int, max_new_tokens: int, sampling: Sampling, sample: int = 0
) -> Request:
    """What an engine gets of a row's `sample`, with the row's settings or with the job's."""
    own = prompt.settings
    row_seed = seeds.of_sample(row_seed, sample)
    if own is None:
        return Request(number, prompt.token_ids, max_new_tokens, row_seed)
    row_seed = seeds.of_seed(row_seed, own.seed, sampling.seed)
    mine = RowSampling(own.temperature, own.top_p, own.stop) if sampling.by_row else None
    return Request(number, prompt.token_ids, own.max_new_tokens, row_seed, sampling=mine)


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
    reasoning = None
    if job.answer.reasoning is not None:
        reasoning = find_reasoning(job.answer.reasoning_markers, tokenizer, detokenizer)
    own = RowSettingsReader(job.generation, schema, context) if job.generation.columns else None
    scoring = _scoring(job, model, tokenizer, detokenizer, config, schema, stop_ids)
    new_tokens = generation.max_new_tokens if scoring is None else 1
    builder = PromptBuilder(job.prompt, tokenizer, context, new_tokens, schema, reasoning, own, scoring)
    answers = job.answer.format
    spec = _engine_spec(job, model, context, stop_ids)
    if answers is not None and scoring is None:
        tables = _token_tables(answers, tokenizer, config, stop_ids, model.tokenizer_path)
        spec = replace(spec, answers=tables)
    choices = scoring if isinstance(scoring, ChoiceScoring) else None
    return PromptCodec(builder, detokenizer, spec, reasoning, answers, choices)


def _scoring(
    job: Job,
    model: ModelFolder,
    tokenizer: Any,
    detokenizer: Detokenizer,
    config: Any,
    schema: pa.Schema,
    stop_ids: tuple[int, ...],
) -> ChoiceScoring | ColumnScoring | None:
    """What the job scores in place of generating."""
    answer = job.answer
    if not answer.is_scored:
        return None
    if getattr(config, "is_encoder_decoder", False):
        name = "score" if answer.score is not None else "probabilities"
        what = f"answer.{name} needs a model without an encoder"
        raise ModelError(what, model.path, "use a causal language model")
    encoder = Encoder(tokenizer)
    if answer.score is not None:
        guard = encoder.special.guard if job.prompt.special_tokens == "text" else unguarded
        return ColumnScoring(answer.score, encoder, schema, guard)
    # A model may have fewer logits than its tokenizer has tokens.
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    ends = [i for i in stop_ids if size is None or i < size]
    return ChoiceScoring(answer.choices or [], encoder, detokenizer, ends, model.tokenizer_path)


def _token_tables(
    answers: AnswerFormat, tokenizer: Any, config: Any, stop_ids: tuple[int, ...], where: str
) -> TokenTables:
    vocabulary = read_vocabulary(tokenizer, where)
    # A model may have fewer logits than its tokenizer has tokens.
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    automaton = token_automaton(
        answers.automaton,
        vocabulary if size is None else vocabulary.cut(size),
        [i for i in stop_ids if size is None or i < size],
        where,
    )
    digest = hashlib.sha256(automaton.token_class.tobytes() + automaton.next_state.tobytes()).hexdigest()
    return TokenTables(automaton.token_class, automaton.next_state, automaton.start, digest, automaton.only)


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
        device="auto",
        trust_remote_code=job.model.trust_remote_code,
        allow_pickle=job.model.allow_pickle,
        sampling=sampling,
        stop_token_ids=stop_ids,
        max_context=context,
        options=job.engine.model_dump(exclude={"kind"}),
    )
