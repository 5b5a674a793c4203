"""Tiny checkpoints in published formats of quantized weights, packed as the formats' definitions say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16


def _scheme(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": False, "symmetric": True, **more}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


_GROUPS = _scheme(4, "int", "group", group_size=GROUP)
SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq_int8": {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "w4a16": _compressed("pack-quantized", _GROUPS, None),
    "w4a16_zeros": _compressed("pack-quantized", {**_GROUPS, "symmetric": False}, None),
    "w4a16_actorder": _compressed("pack-quantized", {**_GROUPS, "actorder": "group"}, None),
    "w8a16": _compressed("pack-quantized", _scheme(8, "int", "channel"), None),
    "w8a16_zeros": _compressed("pack-quantized", {**_GROUPS, "num_bits": 8, "symmetric": False}, None),
    "w8a8_zeros": _compressed("int-quantized", {**_scheme(8, "int", "channel"), "symmetric": False}, None),
    "w8a8": _compressed("int-quantized", _scheme(8, "int", "channel"), _scheme(8, "int", "token", dynamic=True)),
    "static_fp8": _compressed("float-quantized", _scheme(8, "float", "tensor"), _scheme(8, "float", "tensor")),
    "static_fp8_channels": _compressed(
        "float-quantized", _scheme(8, "float", "channel"), _scheme(8, "float", "tensor")
    ),
}  # fmt: skip


def repack(folder: Path, kind: str) -> dict[str, Tensor]:
    """Quantizes the linear layers of the model in `folder`; gives the weights that its numbers stand for."""
    held: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts, meant[name] = _PACKERS[kind.split("_")[0]](weight, kind)
            held |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        else:
            held[name] = meant[name] = weight
    save_file({k: v.contiguous() for k, v in held.items()}, folder / "model.safetensors", {"format": "pt"})
    configure(folder, SETTINGS[kind])
    return meant


def configure(folder: Path, settings: dict[str, Any]) -> None:
    """Writes `quantization_config`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def words(numbers: Tensor, bits: int = 4) -> Tensor:
    """As many numbers as there is room for, along the last dimension, in each int32: the first in the lowest bits."""
    count = 32 // bits
    total = sum(numbers[..., i::count].long() << bits * i for i in range(count))
    return torch.where(total >= 2**31, total - 2**32, total).int()


def _numbers(
    weight: Tensor, symmetric: bool, group: Tensor, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers from 0 (out, in), float16 scales and zero points (out, groups), and what they stand for."""
    count, most = int(group.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.full((len(weight), count), 2 ** (bits - 1))
    for g in range(count):
        part = weight[:, group == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, g] = part.abs().amax(1) / (most / 2) if symmetric else (high - low) / most
        scales[:, g] = scales[:, g].half().float()
        if not symmetric:
            # GPTQ's first format cannot store 0.
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, most).int()
    numbers = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, most).int()
    return numbers, scales.half(), zeros, (numbers - zeros[:, group]) * scales[:, group]


def _awq(weight: Tensor, _kind: str) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales, zeros, meant = _numbers(weight, False, torch.arange(weight.shape[1]) // GROUP)

    def columns(x: Tensor) -> Tensor:
        return words(x.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    return {"qweight": columns(numbers.t()), "qzeros": columns(zeros.t()), "scales": scales.t()}, meant


def _gptq(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    bits = SETTINGS[kind]["bits"]
    group = _shuffled(weight) if bits == 4 else torch.arange(weight.shape[1]) // GROUP
    numbers, scales, zeros, meant = _numbers(weight, False, group, bits)
    stored = zeros if kind == "gptq_v2" else zeros - 1
    parts = {"qweight": words(numbers, bits).t()}
    parts |= {"qzeros": words(stored.t(), bits), "scales": scales.t()}
    return {**parts, "g_idx": group.int()}, meant


def _pack_quantized(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    scheme = SETTINGS[kind]["config_groups"]["group_0"]["weights"]
    bits, symmetric = scheme["num_bits"], scheme["symmetric"]
    group = torch.arange(weight.shape[1]) // scheme.get("group_size", weight.shape[1])
    if "actorder" in scheme:
        group = _shuffled(weight)
    numbers, scales, zeros, meant = _numbers(weight, symmetric, group, bits)
    parts = {
        "weight_packed": words(numbers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = words(zeros.t(), bits).t()
    if "actorder" in scheme:
        parts["weight_g_idx"] = group.int()
    return parts, meant


def _w8a8(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    if kind == "w8a8_zeros":
        every = torch.zeros(weight.shape[1], dtype=torch.long)
        unsigned, scales, zeros, meant = _numbers(weight, False, every, 8)
        parts = {"weight": (unsigned - 128).to(torch.int8), "weight_scale": scales}
        return {**parts, "weight_zero_point": (zeros - 128).to(torch.int8)}, meant
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    numbers = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale.float()


def _shuffled(weight: Tensor) -> Tensor:
    """The group of each input feature, neighbours in others."""
    return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1)) // GROUP


def _static_fp8(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    largest = (
        weight.abs().amax(1, keepdim=True) if kind == "static_fp8_channels" else weight.abs().max().reshape(1)
    )
    scale = largest / 448
    numbers = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.ones(1)}, numbers.float() * scale


_PACKERS = {
    **{"awq": _awq, "gptq": _gptq, "w4a16": _pack_quantized, "w8a16": _pack_quantized},
    **{"w8a8": _w8a8, "static": _static_fp8},
}


def repack_in_blocks(folder: Path, size: int, suffix: str = "_scale_inv") -> dict[str, Tensor]:
    """Quantizes the linear layers of the model in `folder`, experts' too, to fp8 with a scale for each block of size x
    size numbers, whatever is left of the last ones; gives the weights that its numbers stand for."""
    held: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        held[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = (-(-length // size) for length in weight.shape)
            held[name + suffix] = torch.empty(rows, columns)
            held[name], meant[name] = weight.to(torch.float8_e4m3fn), torch.empty_like(weight)
            for row, column in itertools.product(range(rows), range(columns)):
                place = (slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
                scale = held[name + suffix][row, column] = weight[place].abs().max() / 448
                held[name][place] = (weight[place] / scale).to(torch.float8_e4m3fn)
                meant[name][place] = held[name][place].float() * scale
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    configure(folder, block_settings(size, suffix))
    return meant


def block_settings(size: int, suffix: str = "_scale_inv") -> dict[str, Any]:
    """The official format's, or those of compressed-tensors, which calls scales `_scale`."""
    if suffix == "_scale_inv":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [size, size]}
    weights = _scheme(8, "float", "block", block_structure=[size, size])
    inputs = {**_scheme(8, "float", "group", group_size=size), "dynamic": True}
    return _compressed("float-quantized", weights, inputs)
