"""What a model's attention needs, found by running the model once on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from batchrun.engine.protocol import EngineSpec
from batchrun.errors import one_line

_PROBE = "batchrun_probe"
_IGNORED = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "position_ids",
    "use_cache",
    "is_causal",
}


class Unsupported(Exception):
    """The paged engine cannot run this model; the message says why, in words that follow "because"."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer as the kernels see it. `window` counts the keys that a query sees, its own included."""

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, Layer]]:
    """The model's attention modules in the order they run, each with its needs.

    Raises:
        Unsupported: something in the model reads or keeps what paged attention does not give it.
    """
    calls: list[tuple[nn.Module, Layer]] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **needs: Any
    ) -> tuple[Tensor, None]:
        calls.append((module, _needs(module, query, key, value, mask, needs)))
        return query.transpose(1, 2).contiguous(), None  # each token sees itself alone

    AttentionInterface.register(_PROBE, record)
    device = next(model.parameters()).device
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 4]], device=device)  # the same last token
    positions = torch.arange(4, device=device).expand(2, 4)
    last = torch.tensor([3], device=device)
    model.set_attn_implementation(_PROBE)  # type: ignore[operator]
    # With one, some models look into every input for padding, which makes the host wait for the device.
    model.config.pad_token_id = None  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            logits = model(
                input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=last
            ).logits
    except Unsupported:
        raise
    except (
        Exception
    ) as error:  # whatever a model does that needs a cache of its own, a mask, or data on the host
        raise Unsupported(f"its forward pass does not run without a cache ({one_line(error)})") from error
    if logits.shape[1] != 1:
        raise Unsupported("it cannot give the logits of chosen positions alone")
    if device.type == "meta":
        mixes = any(isinstance(module, nn.Conv1d) for module in model.modules())
    else:
        mixes = not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2, equal_nan=True)
    if mixes:
        raise Unsupported("its tokens see each other outside of attention")
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if len(calls) != layers or len({id(module) for module, _ in calls}) != layers:
        raise Unsupported(f"only {len(calls)} of its {layers} layers are plain attention")
    if len({(layer.kv_heads, layer.head_dim) for _, layer in calls}) > 1:
        raise Unsupported("its layers keep keys of different sizes")
    return calls


def decoder_layers(model: nn.Module, attention: list[nn.Module]) -> list[nn.Module]:
    """The model's layers that hold the attention modules, in their order; empty where each has no layer of its own."""
    wanted = {id(module) for module in attention}
    return [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == len(attention)
        for layer in stack
        if any(id(module) in wanted for module in layer.modules())
    ]


def unsupported(spec: EngineSpec) -> str | None:
    """Why the paged engine cannot run the model at `spec.model_path`, in one line; None when it can.

    Reads the configuration alone, no weights.
    """
    try:
        config = AutoConfig.from_pretrained(
            spec.model_path, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=spec.trust_remote_code
            )
        check_positions(config, spec.max_context)
        attention_layers(model.eval())
    except Unsupported as error:
        return str(error)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        return f"it is no causal language model that can be built from its configuration ({one_line(error)})"
    return None


def check_positions(config: PretrainedConfig, max_context: int) -> None:
    """Raises Unsupported for rotary embeddings that change with the longest row of a batch."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        name = kind.get("rope_type", kind.get("type"))
        if name in ("dynamic", "longrope"):
            raise Unsupported(f"its rotary embedding ({name}) depends on the longest row of a batch")


def _needs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, needs: dict[str, Any]
) -> Layer:
    unknown = sorted(
        name for name, value in needs.items() if name not in _IGNORED and value not in (None, False)
    )
    if unknown:
        raise Unsupported(f"its attention wants {', '.join(unknown)}")
    if mask is not None:
        raise Unsupported("its attention wants a mask of its own")
    if needs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Unsupported("its attention looks at later tokens")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise Unsupported("its keys and values have different sizes")
    if query.shape[2] != key.shape[2]:
        raise Unsupported("its attention mixes in tokens from elsewhere")
    scale = needs.get("scaling")
    return Layer(
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        window=needs.get("sliding_window"),
        softcap=needs.get("softcap"),
        sinks=needs.get("s_aux") is not None,
    )
