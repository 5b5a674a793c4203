"""Weights published in other numbers than a model computes in, read as they are and then expanded one by one.

The formats, each by the project that defines it: AWQ's GEMM layout (AutoAWQ; Lin et al., 2023), GPTQ's (AutoGPTQ and
GPTQModel; Frantar et al., 2022), pack-quantized, int-quantized and float-quantized of compressed-tensors, and MXFP4
(OCP Microscaling Formats 1.0) in the layout of gpt-oss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from batchrun.engine.layers.fp8 import Fp8Linear
from batchrun.engine.layers.fp8_weights import MULTIPLE, ROUTERS
from batchrun.engine.weights.lora import Merge
from batchrun.engine.weights.packed_format import PackedFormat, packed_format
from batchrun.engine.weights.part import Part

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each four bits of an int32 hold, from the lowest."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of MXFP4 by their four bits."""

_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """By the name of each quantized weight its tensors: what each is, and its name, shape and dtype in the files; the
    shapes of all tensors in the files by name."""

    format: PackedFormat
    weights: dict[str, dict[str, tuple[str, tuple[int, ...], torch.dtype]]]
    shapes: dict[str, tuple[int, ...]]

    def prepare(self, model: nn.Module) -> None:
        """Gives modules room for the checkpoint's tensors in the place of the weights that these become.

        Raises:
            ValueError: the model has no such weight, or not in a module that this format is read for.
        """
        kind = nn.Module if self.format.kind == "MXFP4" else nn.Linear
        for weight, parts in self.weights.items():
            path, _, name = weight.rpartition(".")
            owner = _module(model, path)
            if not isinstance(owner, kind) or getattr(owner, name, None) is None:
                what = "experts" if self.format.kind == "MXFP4" else "plain linear layers"
                raise ValueError(f"{path} is in {self.format.name}, which is read for {what} alone")
            device = getattr(owner, name).device
            # Some packers write a bias for every layer, of zeros where the model has none.
            if isinstance(owner, nn.Linear) and owner.bias is None and f"{path}.bias" in self.shapes:
                bias = torch.empty(owner.out_features, dtype=owner.weight.dtype, device=device)
                owner.bias = nn.Parameter(bias, requires_grad=False)
            setattr(owner, name, None)
            # All of it comes from the files: transformers has nothing to make up.
            owner._is_hf_initialized = True  # type: ignore[assignment]
            for full, shape, dtype in parts.values():
                empty = torch.empty(shape, dtype=dtype, device=device)
                owner.register_parameter(full.rpartition(".")[2], nn.Parameter(empty, requires_grad=False))

    def expand(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        convert: bool,
        merge: Merge | None,
        part: Part | None = None,
    ) -> None:
        """Makes each weight, or a rank's part of it, of its tensors, which are freed before the next one's turn: with
        an adapter's product if it has one, and then in fp8, if wanted. Those in fp8 stay as they are.

        Raises:
            ValueError: the tensors of a weight do not fit each other or the model.
        """
        for weight, parts in self.weights.items():
            path, _, name = weight.rpartition(".")
            owner = model.get_submodule(path)
            held = {}
            for what, (full, *_) in parts.items():
                held[what] = getattr(owner, full.rpartition(".")[2]).data
                delattr(owner, full.rpartition(".")[2])
            if not self.format.expands:
                if part is not None:
                    held["weight_scale"] = _column(held["weight_scale"]).expand(len(held["weight"]), 1)
                    held = {
                        what: part.of_weight(f"{path}.{what}", held[what])
                        for what in ("weight", "weight_scale")
                    }
                _replace(model, path, _in_fp8(owner, held))
                continue
            if isinstance(owner, nn.Linear) and owner.bias is not None and not owner.bias.any():
                owner.register_parameter("bias", None)
            numbers = expanded(self.format, held)
            if part is not None:
                numbers = part.of_weight(weight, numbers)
            if merge is not None and isinstance(owner, nn.Linear):
                numbers = merge.merged(path, numbers)
            _hold_shape(owner, path, numbers)
            owner.register_parameter(name, nn.Parameter(numbers.to(dtype), requires_grad=False))
            if convert and isinstance(owner, nn.Linear) and _convertible(owner, path):
                layer = Fp8Linear(owner)
                layer.quantize()
                _replace(model, path, layer)


def packed_checkpoint(folder: str, config: Any) -> PackedCheckpoint | None:
    """What the model in `folder` has in one of the formats, if its config names one."""
    form = packed_format(getattr(config, "quantization_config", None))
    if form is None:
        return None
    held: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                held[name] = (name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.float32))
    found = {w: {what: held[n] for what, n in parts.items()} for w, parts in form.parts(held).items()}
    return PackedCheckpoint(form, found, {name: shape for name, shape, _ in held.values()})


_DTYPES = {
    **{"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn},
}


def expanded(form: PackedFormat, parts: dict[str, Tensor]) -> Tensor:
    """The weight that a checkpoint's tensors stand for: (out features, in features) float32; of experts (experts, in
    features, out features).

    Raises:
        ValueError: their shapes do not fit each other.
    """
    if form.kind == "AWQ":
        return _awq(parts["qweight"], parts["qzeros"], parts["scales"])
    if form.kind == "GPTQ":
        return _gptq(form, parts)
    if form.kind == "packed":
        return _packed(form.bits, parts)
    if form.kind == "MXFP4":
        return _mxfp4(parts["blocks"], parts["scales"])
    zero = parts.get("weight_zero_point")
    weight = parts["weight"].float()
    return (weight if zero is None else weight - _column(zero)) * _column(parts["weight_scale"])


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned numbers of `bits` bits in int32 words along `dim`, the lowest bits first: int32, 32 / bits times as
    long there."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    words = words.movedim(dim, -1)
    numbers = (words[..., None] >> shifts) & (2**bits - 1)
    flat: Tensor = numbers.flatten(-2).movedim(-1, dim)
    return flat


def _awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""
    place = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()

    def columns(words: Tensor) -> Tensor:
        eights = unpacked(words, 4, 1).reshape(len(words), -1, len(AWQ_ORDER))
        return eights[..., place].flatten(1)

    group = _groups(len(qweight), len(scales), qweight.device)
    weight: Tensor = (columns(qweight) - columns(qzeros)[group]) * scales.float()[group]
    return weight.t().contiguous()


def _gptq(form: PackedFormat, parts: dict[str, Tensor]) -> Tensor:
    """qweight (in * bits / 32, out), qzeros (groups, out * bits / 32), scales (groups, out), g_idx (in)."""
    numbers, scales = unpacked(parts["qweight"], form.bits, 0), parts["scales"].float()
    qzeros = parts["qzeros"]
    if form.zeros_less_one:
        # GPTQModel takes one off each number by one subtraction from the word, in which a zero borrows from its
        # neighbour: only the same addition gives them back.
        qzeros = qzeros + sum(1 << shift for shift in range(0, 32, form.bits))
    zeros = unpacked(qzeros, form.bits, 1)
    group = parts.get("g_idx")
    group = _groups(len(numbers), len(scales), numbers.device) if group is None else group.long()
    return ((numbers - zeros[group]) * scales[group]).t().contiguous()


def _packed(bits: int, parts: dict[str, Tensor]) -> Tensor:
    """weight_packed (out, in * bits / 32), weight_scale (out, groups), weight_zero_point (out * bits / 32, groups);
    signed numbers, stored with half their range added."""
    rows, columns = (int(length) for length in parts["weight_shape"])
    offset, scale = 2 ** (bits - 1), parts["weight_scale"].float()
    numbers = unpacked(parts["weight_packed"], bits, 1)[:, :columns] - offset
    group = parts.get("weight_g_idx")
    # Those of -1 were never set: the groups are in order.
    if group is not None and bool((group < 0).any()):
        group = None
    group = _groups(columns, scale.shape[1], scale.device) if group is None else group.long()
    if (zeros := parts.get("weight_zero_point")) is not None:
        if zeros.dtype == torch.int32:
            zeros = unpacked(zeros, bits, 0)[:rows] - offset
        numbers = numbers - zeros[:, group]
    weight: Tensor = numbers * scale[:, group]
    return weight


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (experts, out, blocks of 32 numbers, 16) uint8, the first number of two in the lower bits; scales
    (experts, out, blocks) uint8, exponents of two. Expert by expert, so that what is between takes little memory."""
    values = torch.tensor(E2M1, device=blocks.device)
    experts, out, count, size = blocks.shape
    # It holds all of them exactly.
    weight = torch.empty(experts, count * size * 2, out, dtype=torch.bfloat16, device=blocks.device)
    for number in range(experts):
        pairs = torch.stack((blocks[number] & 15, blocks[number] >> 4), -1).flatten(-2)
        exponents = scales[number].int()[..., None] - _E8M0_BIAS
        weight[number] = torch.ldexp(values[pairs.int()], exponents).flatten(-2).t()
    return weight


def _groups(length: int, groups: int, device: torch.device) -> Tensor:
    """The group of each input feature, where all groups are of one size."""
    if groups == 0 or length % groups:
        raise ValueError(f"{length} input features cannot be {groups} groups of one size")
    return torch.arange(length, device=device) // (length // groups)


def _column(x: Tensor) -> Tensor:
    """One number, or one for each output channel, as a column of float32."""
    return x.float().reshape(-1, 1)


def _in_fp8(linear: nn.Module, parts: dict[str, Tensor]) -> Fp8Linear:
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(parts["weight"], requires_grad=False)
    _hold_shape(linear, "a layer", linear.weight)
    layer = Fp8Linear(linear)
    scale = _column(parts["weight_scale"]).expand(layer.out_features, 1).contiguous()
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer


def _hold_shape(owner: nn.Module, path: str, weight: Tensor) -> None:
    if not isinstance(owner, nn.Linear):
        return
    if weight.shape != (want := (owner.out_features, owner.in_features)):
        raise ValueError(f"{path} has the shape {tuple(weight.shape)}, where its config wants {want}")


def _convertible(linear: nn.Linear, path: str) -> bool:
    whole = linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
    return whole and path.rpartition(".")[2] not in (*ROUTERS, "lm_head")


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, last = path.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)
