"""Tiny checkpoints in published formats of quantized weights, packed as the formats' definitions say."""

from __future__ import annotations

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
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "w4a16": _compressed("pack-quantized", _GROUPS, None),
    "w4a16_zeros": _compressed("pack-quantized", {**_GROUPS, "symmetric": False}, None),
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
            parts, meant[name] = _PACKERS[kind.split("_v")[0]](weight, kind)
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


def _numbers(weight: Tensor, symmetric: bool, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers 0 to 15 (out, in), float16 scales and zero points (out, groups), and what they stand for."""
    count = int(group.max()) + 1
    scales, zeros = torch.empty(len(weight), count), torch.full((len(weight), count), 8)
    for g in range(count):
        part = weight[:, group == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, g] = part.abs().amax(1) / 7.5 if symmetric else (high - low) / 15
        scales[:, g] = scales[:, g].half().float()
        if not symmetric:
            # GPTQ's first format can store 1 to 16.
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, 15).int()
    numbers = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, 15).int()
    return numbers, scales.half(), zeros, (numbers - zeros[:, group]) * scales[:, group]


def _awq(weight: Tensor, _kind: str) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales, zeros, meant = _numbers(weight, False, torch.arange(weight.shape[1]) // GROUP)

    def columns(x: Tensor) -> Tensor:
        return words(x.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    return {"qweight": columns(numbers.t()), "qzeros": columns(zeros.t()), "scales": scales.t()}, meant


def _gptq(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    shuffled = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    group = shuffled // GROUP
    numbers, scales, zeros, meant = _numbers(weight, False, group)
    stored = zeros if kind == "gptq_v2" else zeros - 1
    parts = {"qweight": words(numbers).t(), "qzeros": words(stored.t()), "scales": scales.t()}
    return {**parts, "g_idx": group.int()}, meant


def _w4a16(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    zeros_too = kind == "w4a16_zeros"
    numbers, scales, zeros, meant = _numbers(weight, not zeros_too, torch.arange(weight.shape[1]) // GROUP)
    parts = {
        "weight_packed": words(numbers),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if zeros_too:
        parts["weight_zero_point"] = words(zeros.t()).t()
    return parts, meant


def _w8a8(weight: Tensor, _kind: str) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    numbers = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale.float()


def _static_fp8(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    largest = (
        weight.abs().amax(1, keepdim=True) if kind == "static_fp8_channels" else weight.abs().max().reshape(1)
    )
    scale = largest / 448
    numbers = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.ones(1)}, numbers.float() * scale


_PACKERS = {
    **{"awq": _awq, "gptq": _gptq, "w4a16": _w4a16, "w4a16_zeros": _w4a16, "w8a8": _w8a8},
    **{"static_fp8": _static_fp8, "static_fp8_channels": _static_fp8},
}
