"""The least time that a workload can take on this machine, after the roofline model (Williams et al., CACM 2009)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from batchrun.commands.workloads import Workload
from batchrun.engine.layers import fp8
from batchrun.engine.layers.experts import expert_layers


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine was measured to do: matrix operations and memory bytes per second."""

    operations: float
    bytes: float


def measure_ceilings(device: str, dtype: torch.dtype, quantization: str | None = None) -> Ceilings:
    """What `device` does in a large matrix product, of the weights' format, and in a large copy: the best of five runs.

    Args:
        dtype: of the weights and of what they are multiplied with.
        quantization: "fp8" for weights in fp8, which counts on a GPU only.
    """
    gpu = device != "cpu"
    size, width = (8192, 1 << 30) if gpu else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    if quantization and gpu:
        product = _fastest(partial(fp8.scaled_product, *fp8.quantize_rows(a), *fp8.quantize_rows(b)), gpu)
    else:
        product = _fastest(lambda: torch.mm(a, b), gpu)
    source = torch.empty(width, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copied = _fastest(lambda: target.copy_(source), gpu)
    return Ceilings(operations=2 * size**3 / product, bytes=2 * width / copied)


def floor_seconds(
    config: Any,
    workload: Workload,
    ceilings: Ceilings,
    bytes_per_number: int,
    bytes_per_weight: int | None = None,
    fp8_cache: bool = False,
) -> float:
    """The least seconds for a workload: every product once, every key and value read once per new token.

    What begins every prompt is computed once and, since all rows can read it together, read once per step. Of experts,
    a token is multiplied with its own, and a step reads those that its rows choose, each as often as any other.

    Args:
        config: the model's, as transformers reads it.
        bytes_per_number: of weights, keys and values.
        bytes_per_weight: of the layers' weights, where it differs.
        fp8_cache: keys and values take one byte a number and a scale of four for each head.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    embedding = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - embedding * (1 if text.tie_word_embeddings else 2)
    layers = expert_layers(model)
    experts = sum(p.numel() for layer in layers for p in layer.parameters())
    chosen = text.num_experts_per_tok / len(layers[0].gate_up_proj) if layers else 1.0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_bytes = head_dim + 4 if fp8_cache else head_dim * bytes_per_number
    token_bytes = 2 * text.num_hidden_layers * kv_heads * head_bytes
    prompts = np.array([len(p) for p in workload.prompts]) - workload.common
    new = np.array(workload.new_tokens)
    computed = workload.common + prompts.sum() + new.sum()
    attended = (prompts * (workload.common + prompts / 2)).sum() + (
        new * (workload.common + prompts + new / 2)
    ).sum()
    operations = 2 * (body - experts + chosen * experts) * computed + 2 * embedding * new.sum()
    operations += 4 * text.num_hidden_layers * text.num_attention_heads * head_dim * attended
    steps = int(new.max())
    layer_bytes = bytes_per_weight or bytes_per_number
    weights = (body - experts) * layer_bytes + embedding * bytes_per_number
    read = token_bytes * ((new * (prompts + new / 2)).sum() + steps * workload.common) + steps * weights
    rows_of_steps = len(new) - np.searchsorted(np.sort(new), np.arange(steps), side="right")
    read += experts * layer_bytes * (1 - (1 - chosen) ** rows_of_steps).sum()
    return float(operations / ceilings.operations + read / ceilings.bytes)


def _fastest(work: Callable[[], object], gpu: bool) -> float:
    best = float("inf")
    for _ in range(5):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
