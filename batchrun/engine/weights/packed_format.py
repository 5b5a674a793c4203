"""Which published formats of quantized weights are read, by what a checkpoint's config and its tensors' names tell.

Nothing here needs torch: commands look at a model before any engine is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchrun.engine.layers.fp8_weights import becomes_fp8, fp8_bytes

FIX = (
    "use the model's bfloat16 checkpoint, or one in AWQ, GPTQ, compressed-tensors, MXFP4 or block-scaled fp8"
)

# The tensors of a layer by kind; the first holds the numbers.
_PARTS = {
    "AWQ": ("qweight", "qzeros", "scales"),
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "int8": ("weight", "weight_scale", "weight_zero_point"),
    "static fp8": ("weight", "weight_scale"),
}
# MXFP4 has no layers but experts' tensors, each in two: `down_proj_blocks` and `down_proj_scales`.
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`kind`: "AWQ", "GPTQ", "packed" (compressed-tensors' pack-quantized), "int8", "static fp8" or "MXFP4"; the bits
    of a number; `zeros_less_one`: GPTQ's first format, whose zero points are stored less one."""

    kind: str
    bits: int
    zeros_less_one: bool = False

    @property
    def name(self) -> str:
        """For people."""
        if self.kind in ("AWQ", "GPTQ"):
            return f"{self.kind} int{self.bits}"
        return f"int{self.bits}" if self.kind == "packed" else self.kind

    @property
    def expands(self) -> bool:
        """Whether its weights take the model's dtype; the others run as they are."""
        return self.kind != "static fp8"

    def parts(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """By the name of each quantized weight, the names of the tensors that it is made of by what they are."""
        held = set(names)
        found = {}
        if self.kind == "MXFP4":
            for name in sorted(held):
                weight = name.removesuffix(_BLOCKS)
                if name.endswith(_BLOCKS) and weight + _SCALES in held:
                    found[weight] = {"blocks": name, "scales": weight + _SCALES}
            return found
        kinds = _PARTS[self.kind]
        marker = "weight_scale" if kinds[0] == "weight" else kinds[0]
        for name in sorted(held):
            layer, _, last = name.rpartition(".")
            if last == marker:
                found[f"{layer}.weight"] = {k: f"{layer}.{k}" for k in kinds if f"{layer}.{k}" in held}
        return found

    def expanded(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """The checkpoint's tensors as a model has them: shapes by name, given those in the files."""
        found = {name: list(shape) for name, shape in shapes.items()}
        for weight, parts in self.parts(shapes).items():
            for name in parts.values():
                del found[name]
            found[weight] = self._unpacked(list(shapes[next(iter(parts.values()))]))
        return found

    def _unpacked(self, shape: list[int]) -> list[int]:
        numbers = 32 // self.bits
        if self.kind == "AWQ":
            return [shape[1] * numbers, shape[0]]
        if self.kind == "GPTQ":
            return [shape[1], shape[0] * numbers]
        if self.kind == "packed":
            return [shape[0], shape[1] * numbers]
        if self.kind == "MXFP4":
            experts, rows, blocks, size = shape
            return [experts, blocks * size * 2, rows]
        return shape


def packed_format(settings: Any) -> PackedFormat | None:
    """The format that a config's `quantization_config` describes; None where it is none of these."""
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method")
    if method == "awq":
        bits = settings.get("bits", settings.get("w_bit", 4))
        # AutoAWQ and GPTQModel each have a name of their own for the layout.
        forms = {_lower(settings, key, "gemm") for key in ("version", "checkpoint_format")}
        return PackedFormat("AWQ", 4) if bits == 4 and forms == {"gemm"} and not _mixed(settings) else None
    if method == "gptq":
        form = _lower(settings, "checkpoint_format", "gptq")
        if settings.get("bits") not in (4, 8) or form not in ("gptq", "gptq_v2") or _mixed(settings):
            return None
        return PackedFormat("GPTQ", int(settings["bits"]), form == "gptq")
    if method == "mxfp4":
        return PackedFormat("MXFP4", 4)
    return _compressed(settings) if method == "compressed-tensors" else None


def _lower(settings: Mapping[str, Any], key: str, default: str) -> str:
    return str(settings.get(key) or default).lower()


def _mixed(settings: Mapping[str, Any]) -> bool:
    """Whether layers are packed in several ways: GPTQModel's `dynamic`, by layers' names."""
    overrides = (settings.get("dynamic") or {}).values()
    words = str(settings.get("pack_dtype") or "int32").removeprefix("torch.")
    return words != "int32" or any({"bits", "format"} & set(override or {}) for override in overrides)


def _compressed(settings: Mapping[str, Any]) -> PackedFormat | None:
    groups = list((settings.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    kinds = {(scheme.get("type"), scheme.get("num_bits")) for scheme in weights}
    strategies = {scheme.get("strategy") for scheme in weights}
    if len(kinds) != 1:
        return None
    type_, bits = kinds.pop()
    form = settings.get("format")
    if form == "pack-quantized" and type_ == "int" and bits in (4, 8) and strategies <= {"group", "channel"}:
        return PackedFormat("packed", bits)
    if not strategies <= {"channel", "tensor"}:
        return None
    if form == "int-quantized" and (type_, bits) == ("int", 8):
        return PackedFormat("int8", 8)
    inputs = [group.get("input_activations") for group in groups]
    static = all(scheme and scheme.get("num_bits") == 8 and not scheme.get("dynamic") for scheme in inputs)
    if form in ("float-quantized", "naive-quantized") and (type_, bits) == ("float", 8) and static:
        return PackedFormat("static fp8", 8)
    return None


@dataclass(frozen=True, slots=True)
class Blocks:
    """fp8 in which a `block` of rows and columns of a weight has a scale; `suffix` is what a weight's scales are called
    behind its own name."""

    block: tuple[int, int]
    suffix: str

    def weights(self, names: Iterable[str]) -> list[str]:
        """Those among a checkpoint's tensors that have scales."""
        held = set(names)
        return sorted(name for name in held if name + self.suffix in held)


def fp8_blocks(settings: Any) -> Blocks | None:
    """The blocks that a config's `quantization_config` describes, the official one's (DeepSeek, Qwen3) or those of
    compressed-tensors; None where it describes none."""
    if not isinstance(settings, Mapping):
        return None
    method, size = settings.get("quant_method"), settings.get("weight_block_size")
    if method == "fp8" and size:
        return Blocks((int(size[0]), int(size[1])), "_scale_inv")
    if method != "compressed-tensors":
        return None
    groups = (settings.get("config_groups") or {}).values()
    schemes = [group.get("weights") for group in groups]
    sizes = {tuple((scheme or {}).get("block_structure") or ()) for scheme in schemes}
    if not schemes or len(sizes) != 1 or not all(_is(scheme, "block", dynamic=False) for scheme in schemes):
        return None
    size = sizes.pop()
    return Blocks((int(size[0]), int(size[1])), "_scale") if len(size) == 2 else None


def is_read(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `quantization_config` can be loaded."""
    if packed_format(settings) is not None or fp8_blocks(settings) is not None:
        return True
    return settings.get("quant_method") == "compressed-tensors" and channels_and_tokens(settings)


def is_expanded(settings: Mapping[str, Any]) -> bool:
    """Whether its weights take the model's dtype while they are loaded."""
    form = packed_format(settings)
    return fp8_blocks(settings) is not None or (form is not None and form.expands)


def runs_in_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether its weights stay in the fp8 that they are published in."""
    if settings.get("quant_method") != "compressed-tensors":
        return False
    form = packed_format(settings)
    return channels_and_tokens(settings) or (form is not None and not form.expands)


def expanded_bytes(
    settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], size: int, convert: bool
) -> int:
    """What a checkpoint's weights take once those that are quantized are expanded.

    Args:
        shapes: of its tensors by name.
        size: bytes of a number that is expanded.
        convert: whether layers become fp8 then.
    """
    form, blocks = packed_format(settings), fp8_blocks(settings)
    found = form.expanded(shapes) if form is not None else dict(shapes)
    if blocks is not None:
        found = {name: shape for name, shape in found.items() if not name.endswith(blocks.suffix)}
    return sum(
        fp8_bytes(shape) if convert and becomes_fp8(name, shape) else math.prod(shape) * size
        for name, shape in found.items()
    )


def quantized_experts(settings: Any, names: Iterable[str]) -> str | None:
    """Which layers of experts a checkpoint has in a format that is read for linear layers alone, by its config's
    `quantization_config` and its tensors' names; None where there are none."""
    form = packed_format(settings)
    if form is not None:
        layers = sorted(form.parts(names)) if form.kind != "MXFP4" else []
    elif isinstance(settings, Mapping) and runs_in_fp8(settings):
        layers = sorted(name for name in names if name.endswith(".weight_scale"))
    else:
        layers = []
    found = next((name.rpartition(".")[0] for name in layers if ".experts." in name), None)
    return found and f"experts in {form.name if form else 'fp8 by channels'}, such as {found}"


def channels_and_tokens(settings: Mapping[str, Any]) -> bool:
    """Whether it is fp8 with a scale for each output channel, and for each token."""
    groups = list((settings.get("config_groups") or {}).values())
    return bool(groups) and all(
        _is(group.get("weights"), "channel", dynamic=False)
        and _is(group.get("input_activations"), "token", dynamic=True)
        and not group.get("output_activations")
        for group in groups
    )


def _is(scheme: Mapping[str, Any] | None, strategy: str, dynamic: bool) -> bool:
    return (
        scheme is not None
        and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        and scheme.get("strategy") == strategy
        and bool(scheme.get("dynamic")) == dynamic
        and scheme.get("symmetric", True)
    )


def described(settings: Mapping[str, Any]) -> str:
    """What a config says about its format, for an error."""
    facts = [str(settings.get("quant_method") or "an unnamed way")]
    keys = ("format", "checkpoint_format", "activation_scheme", "bits", "version", "dynamic", "pack_dtype")
    facts += [f"{key} {settings[key]}" for key in keys if settings.get(key)]
    for group in (settings.get("config_groups") or {}).values():
        scheme = group.get("weights") or {}
        facts.append(f"weights of {scheme.get('num_bits')} bits by {scheme.get('strategy')}")
    return ", ".join(facts)
