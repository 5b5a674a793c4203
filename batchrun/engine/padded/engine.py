"""The padded engine: windows of rows sorted by length, in rectangles, through `model.generate`."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from batchrun.engine.layers.experts import use_grouped_experts
from batchrun.engine.layers.fp8 import format_of
from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.padded.batching import PaddedBatch, by_length, take_batch
from batchrun.engine.padded.steps import BatchState, logits_processors
from batchrun.engine.protocol import NO_TOKENS, Completion, EngineSpec, EngineStats, Request, TokenValues
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.scoring import ScoringHead, score_completion
from batchrun.engine.tokens.stopping import StopStrings
from batchrun.engine.tokens.token_values import ValuesOfTokens, first, join, to_numpy
from batchrun.engine.weights.loading import choose_dtype, load_config, load_model
from batchrun.engine.weights.row_adapters import TokenAdapters
from batchrun.errors import FaultCode, ModelError, RowFault

# A small model's CPU time for 120 rows of about 250 tokens: 6.3 s with batches of 1,024 padded tokens,
# 5.0 s with 4,096, 4.6 s with 16,384.
CPU_BATCH_TOKENS = 16384


class PaddedEngine:
    """For every model that transformers can generate with; decoders are padded left, encoders right.

    Takes all waiting requests, up to `window_rows` of them, sorts them, cuts them into batches of at most
    `batch_tokens` padded tokens (rows x (longest prompt + most new tokens)) and runs them all before it
    looks for new requests. `batch_tokens` and `window_rows` come from the spec's options. An out-of-memory
    halves the budget for good, and is a row's fault only when the row was alone.

    Args:
        order: puts a window in order; longest first. Only measurements want another one.
    """

    def __init__(
        self, spec: EngineSpec, model: Any, order: Callable[[Iterable[Request]], list[Request]] = by_length
    ) -> None:
        if model.device.type == "cuda":
            use_grouped_experts(model)
        self.spec = spec
        self.model = model
        self.order = order
        self.window_rows = cast(int, spec.options.get("window_rows") or 8192)
        self.budget = cast(int, spec.options.get("batch_tokens") or _default_budget(model))
        self.stats = EngineStats(
            engine="padded",
            attention=model.config._attn_implementation or "none",
            device=_device_name(spec.device),
            dtype=format_of(model),
            gauges={"batch_tokens": self.budget},
        )
        self._stop_ids = torch.tensor(spec.stop_token_ids, dtype=torch.int64, device=spec.device)
        self._stop_strings = StopStrings(spec)
        self._values_of_tokens = ValuesOfTokens(spec.sampling)
        self._answer_mask = AnswerMask.of(spec, model)
        self._scoring = ScoringHead(model)
        self._adapters = TokenAdapters.of(model)
        self._left = not model.config.is_encoder_decoder
        # The model's own generation config would add what the job did not ask for: beams, penalties, lengths.
        own = model.generation_config
        self._generation = {
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": own.pad_token_id or 0,
            "bos_token_id": own.bos_token_id,
            "decoder_start_token_id": own.decoder_start_token_id,
            "forced_bos_token_id": own.forced_bos_token_id,
        }
        model.generation_config = GenerationConfig(**self._generation)
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        self._equal_lengths = self._padding_changes_answers()
        if self._equal_lengths:
            self.stats.notes.append(
                "batches of equal lengths only, since padding changes this model's answers"
            )

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        """See `Engine`."""
        model, why_not_flash = _load_with_best_attention(spec)
        engine = cls(spec, model)
        if why_not_flash:
            engine.stats.notes.append(f"{engine.stats.attention} attention, since {why_not_flash}")
        return engine

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `Engine`."""
        for window in _windows(requests, self.window_rows):
            if not self._left:
                for request in window:  # a decoder of its own starts over
                    request.generated, request.values = NO_TOKENS, {}
            for request in window:
                request.waiting = True
            waiting = deque(self.order(window))
            self.stats.requests += len(waiting)
            while waiting:
                batch = take_batch(waiting, self.budget, self._equal_lengths)
                for request in batch.requests:
                    request.waiting = False
                if dropped := {request.id for request in batch.requests if request.cancelled}:
                    yield from (request.so_far() for request in batch.requests if request.id in dropped)
                    waiting.extendleft(r for r in reversed(batch.requests) if r.id not in dropped)
                    continue
                completions = self._run(batch)
                if completions is not None:
                    self.stats.completions += len(completions)
                    yield from completions
                    ended = {completion.id for completion in completions}
                    waiting.extendleft(r for r in reversed(batch.requests) if r.id not in ended)
                elif len(batch.requests) > 1:
                    waiting.extendleft(reversed(batch.requests))
                else:
                    self.stats.completions += 1
                    yield _fault(
                        batch.requests[0], FaultCode.OUT_OF_MEMORY, "does not fit the device, even alone"
                    )

    def _run(self, batch: PaddedBatch) -> list[Completion] | None:
        """The batch's completions, or None when it did not fit: the budget is smaller from then on.

        Rows that a cancelled neighbour cut short are not among them; they can go on from where they are.
        """
        started = time.monotonic()
        try:
            state = self._new_state(batch)
            with self._scores_of(batch) as scores:
                tokens = self._model_generate(batch, state)
            tokens = tokens[:, state.width :].to("cpu", torch.int32)
            scored = scores()
            values = self._values_by_row(state)
            ends = [state.lengths, state.stopped, state.broken, state.cut, state.settled]
            outcomes = torch.stack(ends).cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._count(batch, state.steps, time.monotonic() - started)
            rows = zip(batch.requests, tokens.numpy(), values, outcomes.T, strict=True)
            generated = [row for row in rows if row[0].scored is None]
            completions = [completion for row in generated if (completion := self._completion(*row))]
            return [*scored, *completions]
        # Out of the except block: the error's traceback holds the very tensors that are to be freed.
        self._shrink(batch)
        return None

    def _new_state(self, batch: PaddedBatch) -> BatchState:
        # `generate` gives answers back after the prompts, or after the one token that starts a decoder.
        width = batch.longest if self._left else 1
        return BatchState(
            batch.requests,
            self._stop_ids,
            self._stop_strings,
            width,
            self.stats,
            self._values_of_tokens,
            self._answer_mask,
        )

    def _model_generate(self, batch: PaddedBatch, state: BatchState, **options: Any) -> Any:
        """Start and answer of each row, int64 (rows, width + steps)."""
        ids, mask = (tensor.to(self.spec.device) for tensor in batch.rectangle(self._left))
        masked = {"attention_mask": mask} if self._takes_mask else {}
        if self._adapters is not None:
            self._adapters.tokens = torch.full_like(self._adapters.tokens, batch.requests[0].adapter)
        with torch.inference_mode():
            return self.model.generate(
                ids,
                **masked,
                generation_config=GenerationConfig(
                    **self._generation, max_new_tokens=batch.new_tokens, **options
                ),
                logits_processor=logits_processors(self.spec.sampling, state),
                stopping_criteria=[state],
            )

    @contextmanager
    def _scores_of(self, batch: PaddedBatch) -> Iterator[Callable[[], list[Completion]]]:
        """Around the batch's way through the model; gives the completions of its requests to score, once it is
        through."""
        requests = [(row, one) for row, one in enumerate(batch.requests) if one.scored is not None]
        if not requests:
            yield list
            return
        if not self._left:
            what = "a model with an encoder cannot score answers"
            raise ModelError(what, self.spec.model_path, "use a causal language model")
        wanted = [one.scored for _, one in requests if one.scored is not None]
        counts = [len(scored.token_ids) for scored in wanted]
        rows = np.repeat([row for row, _ in requests], counts)
        columns = batch.longest - 1 - np.concatenate([scored.back for scored in wanted]).astype(np.int64)
        # Several tokens may be wanted behind the same one.
        unique, places = np.unique(rows * batch.longest + columns, return_inverse=True)
        device = self.spec.device
        flat = torch.from_numpy(unique).to(device)
        with self._scoring.states(flat // batch.longest, flat % batch.longest) as states:

            def completions() -> list[Completion]:
                tokens = torch.from_numpy(np.concatenate([one.token_ids for one in wanted]).astype(np.int64))
                at = torch.from_numpy(places.reshape(-1)).to(device)
                with torch.inference_mode():
                    found = self._scoring.logprobs(states[0], tokens.to(device), at, places.reshape(-1))
                parts = np.split(found.cpu().numpy(), np.cumsum(counts)[:-1])
                return [score_completion(one, part) for (_, one), part in zip(requests, parts, strict=True)]

            yield completions

    def _values_by_row(self, state: BatchState) -> list[TokenValues]:
        """Each row's values of all the batch's steps."""
        if not state.values:
            return [{} for _ in state.requests]
        steps = {name: torch.stack([step[name] for step in state.values], dim=1) for name in state.values[0]}
        columns = to_numpy(steps)
        return [{name: column[row] for name, column in columns.items()} for row in range(len(state.requests))]

    def _count(self, batch: PaddedBatch, steps: int, seconds: float) -> None:
        # The rectangle: prompts as wide as the longest, and a column per step for every row, finished or
        # not. The last column was sampled and never run; counted on both sides, a batch without padding is
        # exactly 1.
        self.stats.computed_tokens += len(batch.requests) * (batch.longest + steps)
        self.stats.prompt_tokens += sum(len(request.start) for request in batch.requests)
        self.stats.batches += 1
        self.stats.busy_seconds += seconds

    def _completion(
        self, request: Request, tokens: NDArray[np.int32], values: TokenValues, outcome: NDArray[np.int64]
    ) -> Completion | None:
        length, stopped, broken, cut, settled = outcome.tolist()
        if broken:
            return _fault(
                request, FaultCode.BAD_LOGITS, f"the model's logits are not finite at new token {length}"
            )
        self.stats.output_tokens += length
        answer = np.concatenate([request.generated, tokens[:length]])
        values = join([request.values, first(values, length)])
        if settled and self._answer_mask is not None:
            rest = self._answer_mask.rest(request, answer)[: request.max_new_tokens - len(answer)]
            stopped = bool(rest) and rest[-1] in self.spec.stop_token_ids
            answer = np.concatenate([answer, np.array(rest, np.int32)])
            self.stats.output_tokens += len(rest)
            self.stats.computed_tokens += len(rest)
        if not cut:
            return Completion(request.id, answer, "stop" if stopped else "length", values=values)
        if self._left:
            request.generated, request.values = answer, values
        return request.so_far() if request.cancelled else None

    def _shrink(self, batch: PaddedBatch) -> None:
        self.budget = max(1, min(self.budget, batch.padded_tokens // 2))
        self.stats.gauges["batch_tokens"] = self.budget
        self.stats.notes.append(
            f"out of memory at {batch.padded_tokens} padded tokens ({len(batch.requests)} rows), "
            f"batches of at most {self.budget} since"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _padding_changes_answers(self) -> bool:
        """Tries it: some models run their state through padding, whatever the mask says."""
        if not self._takes_mask:
            return True
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        row = Request(0, np.arange(8, 16, dtype=np.int32) % vocab, 1)
        longer = Request(1, np.arange(32, 48, dtype=np.int32) % vocab, 1)
        alone, padded = self._first_logits(PaddedBatch([row])), self._first_logits(PaddedBatch([row, longer]))
        # In half precision, rounding moves logits by a few per cent at most; padding that leaks, by far more.
        return bool(torch.linalg.norm(padded - alone) > 0.1 * torch.linalg.norm(alone))

    def _first_logits(self, batch: PaddedBatch) -> torch.Tensor:
        """The first row's logits for its first new token, float32 (vocabulary,)."""
        state = self._new_state(batch)
        output = self._model_generate(batch, state, output_logits=True, return_dict_in_generate=True)
        return cast(torch.Tensor, output.logits[0][0])


def _load_with_best_attention(spec: EngineSpec) -> tuple[Any, str]:
    """The model with flash-attn, or with torch's attention and the reason why not."""
    reason = _why_not_flash(spec)
    if not reason:
        try:
            return load_model(spec, "flash_attention_2"), ""
        except ModelError as error:
            reason = f"the model cannot use flash-attn: {error.what}"
    # Some releases of transformers run soft-capped models through SDPA, which leaves the cap out.
    capped = getattr(load_config(spec).get_text_config(decoder=True), "attn_logit_softcapping", None)
    return load_model(spec, "eager" if capped else None), reason


def _why_not_flash(spec: EngineSpec) -> str:
    if not spec.device.startswith("cuda"):
        return "flash-attn needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if choose_dtype(spec, load_config(spec)) == torch.float32:
        return "flash-attn needs half precision"
    return ""


def _windows(requests: Iterator[Request | None], rows: int) -> Iterator[list[Request]]:
    """All that waits, up to so many rows, again and again until no more will come."""
    window: list[Request] = []
    for request in requests:
        if request is not None:
            window.append(request)
        if window and (request is None or len(window) == rows):
            yield window
            window = []
    if window:
        yield window


def _default_budget(model: Any) -> int:
    """Padded tokens for which keys, values and one layer's activations fill most of the free memory."""
    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = model.dtype.itemsize
    # Half as much again for keys and values: the growing cache is copied layer by layer at every step.
    cache = 1.5 * 2 * config.num_hidden_layers * heads * head_size * item
    activations = item * (
        8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    )
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, int(0.8 * free / (cache + activations)))


def _fault(request: Request, code: FaultCode, message: str) -> Completion:
    return Completion(request.id, NO_TOKENS, "error", RowFault(code, message))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
