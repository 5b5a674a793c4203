"""What every rank of an engine has on its device: the compiled model, the pages, and what runs both."""

from __future__ import annotations

from typing import Any

from batchrun.engine.layers.experts import use_grouped_experts
from batchrun.engine.layers.fp8 import unsupported_device
from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.attention.architecture import check_positions, decoder_layers
from batchrun.engine.paged.attention.operator import KVCache
from batchrun.engine.paged.device.compiling import compile_layers, compile_sampler
from batchrun.engine.paged.device.group import Group
from batchrun.engine.paged.device.memory import Budget, affordable_pages
from batchrun.engine.paged.device.projections import fuse_projections
from batchrun.engine.paged.device.runner import Launch, Runner
from batchrun.engine.paged.device.sampler import Sampler
from batchrun.engine.processes import stage
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.tokens.token_values import ValuesOfTokens
from batchrun.errors import ModelError


def budget_of(spec: EngineSpec, model: Any, group: Group | None) -> Budget:
    """What the engine may use, the same on every rank."""
    parameters = sum(weight.numel() for weight in model.parameters()) * (group.size if group else 1)
    return Budget.of(spec.options, next(model.parameters()).device, parameters)


def make_runner(
    spec: EngineSpec,
    model: Any,
    sampler: Sampler,
    budget: Budget,
    page_size: int,
    group: Group | None,
    launch: Launch | None = None,
) -> Runner:
    """Takes over the model; with no pages yet, see `allocate_pages`. `launch` is how rank 0 has all of them
    run a batch.

    Raises:
        Unsupported: see `batchrun.engine.paged.attention.architecture.unsupported`.
        ModelError: keys and values cannot be in fp8 on the device.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    check_positions(model.config, spec.max_context)
    in_fp8 = spec.cache_dtype == "fp8"
    if in_fp8 and (reason := unsupported_device(device)):
        what = f"keys and values in fp8 cannot run here, since {reason}"
        raise ModelError(what, "engine.cache_dtype", "leave the key out")
    cache = KVCache(model.requires_grad_(False), page_size, dtype, device, in_fp8)
    if devices.is_gpu(device):
        fuse_projections(model)
        use_grouped_experts(model)
    if budget.compile:
        compile_layers(model, cache.modules)
        if not sampler.greedy:
            compile_sampler(sampler)
    if group is not None:
        group.progress.mark_layers(decoder_layers(model, cache.modules))
    return Runner(
        model,
        cache,
        sampler,
        sorted(set(spec.stop_token_ids)),
        budget.max_rows,
        spec.max_context,
        budget.decode_steps,
        device,
        ValuesOfTokens(spec.sampling),
        launch,
        group.progress.mark if group else None,
    )


def allocate_pages(spec: EngineSpec, runner: Runner, budget: Budget, group: Group | None) -> int:
    """Takes the memory that is left for pages, as many on every rank as the one with the least can hold; their number,
    the null page included."""

    def warm_up() -> None:
        if budget.compile:
            stage.enter("compiling")
        runner.warm_up(budget.prefill_tokens)

    pages = affordable_pages(runner.cache, budget, spec.max_context, runner.device, warm_up)
    if group is not None:
        pages = group.least(pages)
    runner.cache.allocate(pages)
    return pages
