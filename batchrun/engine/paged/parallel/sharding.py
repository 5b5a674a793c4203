"""A rank's share of a model: a model of the same kind with fewer heads and narrower layers, whose partial results are
summed over the ranks.

Layers by columns (`q_proj`, `gate_proj`) have a share of their outputs, those by rows (`o_proj`, `down_proj`) of their
inputs, so that one sum after each pair is all that the ranks exchange (Shoeybi et al., Megatron-LM, 2019). Experts are
divided like that within each. Embeddings, norms and routers are whole on every rank; the head is divided by tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from batchrun.engine.layers.fp8 import Fp8Linear, quantize_rows
from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.parallel.sums import (
    columns_of_ranks,
    sum_of_ranks,
    summed_fp8_linear,
    summed_linear,
)
from batchrun.engine.weights.lora import Lora

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size",
            "shared_expert_intermediate_size")  # fmt: skip
"""What a rank's config has a share of."""

_JOINED = ("qkv_proj", "gate_up_proj")
"""Names of layers that are several by columns in one, for which transformers' own plan gathers whole outputs."""

_BY_COLUMNS, _BY_ROWS = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")
"""Names that experts' layers have in checkpoints that keep each expert apart."""


@dataclass(frozen=True, slots=True)
class Share:
    """Where a rank's part of a weight is: so much of dimension `dim` from each of `begins`; `blank` instead of it
    where a bias, which is added before the sum, is another rank's."""

    dim: int = 0
    begins: tuple[int, ...] = ()
    length: int = 0
    blank: bool = False

    def of(self, whole: Any) -> Tensor:
        """The part of a tensor, or of one in a file."""
        if self.blank:
            return torch.zeros_like(whole[...])
        if not self.begins:
            tensor: Tensor = whole[...]
            return tensor
        ahead = (slice(None),) * self.dim
        parts = [whole[(*ahead, slice(begin, begin + self.length))] for begin in self.begins]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


class Sharding:
    """How one rank of `size` has a model."""

    def __init__(self, config: Any, rank: int, size: int) -> None:
        """`config` is the whole model's.

        Raises:
            Unsupported: the model cannot be divided so.
        """
        self.rank, self.size = rank, size
        self.config = _divided(config, size)
        whole, mine = _without_data(config), _without_data(self.config)
        self._sections = _sections(config.get_text_config())
        self._shapes = {name: weight.shape for name, weight in mine.named_parameters()}
        self._interleaved = getattr(config, "model_type", "") in ("gpt_oss",)
        self._summed = _check(
            whole, mine, getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
        )
        self._biases = {f"{name}.bias" for name in self._summed} | {
            f"{name}.down_proj_bias" for name in self._summed
        }

    def share(self, name: str, shape: tuple[int, ...]) -> Share:
        """What of a checkpoint's tensor, by name and shape, is this rank's."""
        owner, _, kind = name.rpartition(".")
        layer = owner.rpartition(".")[2]
        if name in self._biases and self.rank:
            return Share(blank=True)
        mine = self._shapes.get(name)
        if mine is None and kind == "weight_scale":
            # Of each output channel of a layer in fp8. One divided by rows keeps the scale of the whole channel.
            rows = self._shapes.get(f"{owner}.weight", shape)[0]
            mine = torch.Size((rows, *shape[1:]))
        if mine is None and ".experts." in name and kind == "weight":
            dim = 0 if layer in _BY_COLUMNS else 1 if layer in _BY_ROWS else None
            return Share() if dim is None else self._even(dim, shape[dim])
        if mine is None or len(mine) != len(shape):
            return Share()
        differing = [dim for dim, (own, all_) in enumerate(zip(mine, shape, strict=True)) if own != all_]
        if len(differing) != 1:
            return Share()
        dim = differing[0]
        joined = layer if layer in _JOINED else kind if kind in _JOINED else None
        if joined and not self._interleaved:
            return self._of_sections(dim, self._sections[joined], shape[dim])
        return self._even(dim, shape[dim])

    def of_weight(self, name: str, weight: Tensor) -> Tensor:
        """See `Part`."""
        return self.share(name, tuple(weight.shape)).of(weight)

    def of_adapter(self, adapter: dict[str, Lora]) -> dict[str, Lora]:
        """See `Part`: a layer by columns has a share of b's rows, one by rows of a's columns."""
        parts = {}
        for layer, lora in adapter.items():
            share = self.share(f"{layer}.weight", (len(lora.b), lora.a.shape[1]))
            parts[layer] = Lora(share.of(lora.a), lora.b) if share.dim else Lora(lora.a, share.of(lora.b))
        return parts

    def _even(self, dim: int, length: int) -> Share:
        own = length // self.size
        return Share(dim, (self.rank * own,), own)

    def _of_sections(self, dim: int, sizes: tuple[int, ...], length: int) -> Share:
        unit = length // sum(sizes)
        begins, lengths, begin = [], [], 0
        for size in sizes:
            lengths.append(size * unit // self.size)
            begins.append(begin + self.rank * lengths[-1])
            begin += size * unit
        own = math.gcd(*lengths)
        return Share(
            dim,
            tuple(b + i * own for b, n in zip(begins, lengths, strict=True) for i in range(n // own)),
            own,
        )

    def finish(self, model: nn.Module) -> None:
        """Has a loaded model of this rank's config sum and gather where the ranks' parts come together."""
        for name in self._summed:
            owner, _, last = name.rpartition(".")
            parent = model.get_submodule(owner)
            setattr(parent, last, Summed(getattr(parent, last)))
        head = model.get_output_embeddings()  # type: ignore[operator]
        tied = head.weight is model.get_input_embeddings().weight  # type: ignore[operator]
        model.set_output_embeddings(DividedHead(head, self.rank, self.size, tied))  # type: ignore[operator]


class Summed(nn.Module):
    """A part of a layer that has a share of its inputs on each rank."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the part gives, summed over the ranks."""
        part = self.part
        if not isinstance(part, nn.Linear | Fp8Linear):
            made: Tensor = part(*arguments, **named).contiguous()
            sum_of_ranks(made)
            return made
        x: Tensor = arguments[0]
        rows = x.reshape(-1, part.in_features)
        if isinstance(part, Fp8Linear):
            numbers, scale = quantize_rows(rows)
            made = summed_fp8_linear(numbers, scale, part.weight, part.weight_scale, part.bias, x.dtype)
        else:
            made = summed_linear(rows, part.weight, part.bias)
        return made.view(*x.shape[:-1], part.out_features)


class DividedHead(nn.Module):
    """The layer that gives the logits, divided by tokens of the vocabulary."""

    def __init__(self, head: nn.Linear, rank: int, size: int, tied: bool) -> None:
        """`tied`: the weight is the embeddings', and stays whole."""
        super().__init__()
        self.out_features, self.size = head.out_features, size
        self.in_features = head.in_features
        own = -(-head.out_features // size)
        begin, end = min(rank * own, head.out_features), min((rank + 1) * own, head.out_features)
        self._missing = own - (end - begin)
        self.first, self.whole = begin, True
        self.has_tokens_everywhere = (size - 1) * own < head.out_features
        # A copy, so that the whole is freed.
        weight = head.weight.data[begin:end]
        self.weight = nn.Parameter(weight if tied else weight.clone(), requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias.data[begin:end], False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., vocabulary) of (..., in features); this rank's tokens alone, from `first` on, if not `whole`."""
        if not self.whole:
            return functional.linear(x, self.weight, self.bias)
        logits = functional.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        if self._missing:
            logits = functional.pad(logits, (0, self._missing))
        whole: Tensor = columns_of_ranks(logits, self.size)[:, : self.out_features]
        return whole.view(*x.shape[:-1], self.out_features)


def _divided(config: Any, size: int) -> Any:
    mine = copy.deepcopy(config)
    text = mine.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise Unsupported(
            f"transformers has no plan (base_model_tp_plan) to divide {text.model_type} over GPUs"
        )
    if getattr(text, "activation_sparsity_pattern", None) is not None:
        raise Unsupported("its layers look at all of their inner numbers at once")
    if not getattr(text, "head_dim", None):
        text.head_dim = text.hidden_size // text.num_attention_heads
    for name in _DIVIDED:
        count = getattr(text, name, None)
        if count is None:
            continue
        if not isinstance(count, int) or count % size:
            raise Unsupported(f"its {name} ({count}) cannot be divided by {size} GPUs")
        setattr(text, name, count // size)
    return mine


def _without_data(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def _sections(text: Any) -> dict[str, tuple[int, ...]]:
    """Of layers that are several in one, how large each is in proportion."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return {"qkv_proj": (heads, kv_heads, kv_heads), "gate_up_proj": (1, 1)}


def _check(whole: nn.Module, mine: nn.Module, plan: dict[str, str]) -> list[str]:
    """The parts whose results are to be summed: linear layers with a share of the inputs, and experts.

    Raises:
        Unsupported: a part that a rank would have less of needs to see the whole.
    """
    # A layer divided by columns whose whole output another part needs, as of a norm over all heads.
    gathered = {name.rpartition(".")[2] for name, style in plan.items() if "gather_output" in style}
    summed: list[str] = []
    for name, module in mine.named_modules():
        other = whole.get_submodule(name)
        shares = [
            key
            for key, weight in module.named_parameters(recurse=False)
            if weight.shape != other.get_parameter(key).shape
        ]
        if not shares:
            continue
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            if last in gathered and last not in _JOINED:
                raise Unsupported(f"the whole output of its {last} is needed on each GPU")
            if module.in_features != other.in_features:
                summed.append(name)
        elif last == "experts":
            summed.append(name)
        elif shares != ["sinks"]:
            raise Unsupported(f"its {name} ({', '.join(shares)}) cannot be divided")
    if not summed:
        raise Unsupported("none of its layers can be divided")
    return summed
