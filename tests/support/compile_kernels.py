"""Compiles the kernels of attention, of experts and of answers' masks for GPUs, on a machine that needs none.

It says what shared memory each takes. Kernels of attention take turns: each variant for each model is compiled for one
of the GPUs, and each variant for each GPU.

    python tests/support/compile_kernels.py

In a process of its own: where Triton interprets, it compiles nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from batchrun.engine.layers import expert_groups, experts_kernels, experts_persistent
from batchrun.engine.paged.attention import cascade, fp8_pages, online_softmax, prefill_hopper
from batchrun.engine.paged.attention import cascade_kernels as cascade_attention
from batchrun.engine.paged.attention import decode as decode_attention
from batchrun.engine.paged.attention import prefill as prefill_attention
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.device import sampler_kernels as small_kernels

# Compute capability, and bytes of shared memory that a block of threads may have there.
GPUS = {80: 166912, 90: 232448}
# query heads, key heads, head size, window, soft-capped: as in models of these kinds.
SHAPES = {
    "llama": (32, 8, 128, 0, False),
    "qwen2": (14, 2, 64, 0, False),
    "phi3": (32, 32, 96, 2047, False),
    "gemma2": (8, 4, 256, 4096, True),
    "falcon": (71, 1, 64, 0, False),
}
POINTERS = {
    **dict.fromkeys(("query", "key", "value", "keys", "values", "key_cache", "value_cache", "out"), "bf16"),
    **dict.fromkeys(("block_tables", "cu_seqlens_q", "seq_lens", "starts"), "i32"),
    **{"logits": "bf16", "states": "i32", "mask_of": "i32", "masks": "i32", "tokens": "i64"},
    **dict.fromkeys(("x", "weight", "bias", "parts", "gated"), "bf16"),
    **dict.fromkeys(("order", "tiles", "tiles_needed", "counts", "totals"), "i32"),
    **{"x_scale": "fp32", "weight_scale": "fp32", "weights": "fp32", "expert_ids": "i32"},
    **{"members": "i32", "items": "i32", "pages": "i64", "prefix_out": "fp32", "prefix_lse": "fp32"},
    **{"slot_mapping": "i64", "lse": "fp32", "split_out": "fp32", "split_lse": "fp32"},
    **dict.fromkeys(("key_back", "value_back", "sinks"), "bf16"),
}
FIRST_WITH_FP8 = 89
# Without scales and sinks, and over pages in fp8.
PLAIN = dict.fromkeys(("key_scales", "value_scales", "sinks"))
FP8 = {
    **dict.fromkeys(("key_cache", "value_cache"), "fp8e4nv"),
    **dict.fromkeys(("key_scales", "value_scales"), "fp32"),
}
# How many variants of kernels there were so far, by GPU and model.
variants: Counter[tuple[int, str]] = Counter()
NUMBERS = {"scale": "fp32", "softcap": "fp32", "alpha": "fp32", "limit": "fp32"}


def main() -> None:
    check_names()
    for gpu, memory in GPUS.items():
        for name, (heads, num_kv_heads, head_dim, window, softcap) in SHAPES.items():
            group_size, block_d = heads // num_kv_heads, triton.next_power_of_2(head_dim)
            shape = {
                "GROUP_SIZE": group_size,
                "HEAD_DIM": head_dim,
                "WINDOW": window,
                "SOFTCAP": softcap,
                "BLOCK_D": block_d,
            }
            block_m = decode_attention.decode_block_m(group_size)
            constants = {**shape, "NUM_KV_HEADS": num_kv_heads, "BLOCK_M": block_m, "PAGE_SIZE": 256}
            for split, choices in (
                (False, decode_attention.DECODE_BLOCKS),
                (True, decode_attention.SPLIT_BLOCKS),
            ):
                block_n, num_stages = online_softmax.fitting_blocks(choices, block_m, 2 * block_d, memory)
                own = {"BLOCK_N": block_n, "NUM_STAGES": num_stages, "SPLIT_KV": split, "STARTS": not window}
                report(gpu, name, decode_attention._decode, {**constants, **own, **PLAIN}, 4)
                if gpu >= FIRST_WITH_FP8:
                    warps = decode_attention.decode_warps(block_d, fp8=True)
                    many = () if split else (decode_attention.MANY_FP8_BLOCKS,)
                    for choices in (*many, decode_attention.FP8_BLOCKS):
                        block_n, num_stages = online_softmax.fitting_blocks(choices, block_m, block_d, memory)
                        own |= {"BLOCK_N": block_n, "NUM_STAGES": num_stages}
                        report(gpu, name, decode_attention._decode, {**constants, **own}, warps, FP8)
            if not window and block_m * block_d <= decode_attention.MAX_REST_NUMBERS:
                ((block_n, num_stages),) = decode_attention.REST_BLOCKS
                own |= {"BLOCK_N": block_n, "NUM_STAGES": num_stages, "SPLIT_KV": False, "STARTS": True}
                rest = {**constants, **own, **PLAIN}
                report(gpu, name, decode_attention._decode, rest, decode_attention.REST_WARPS)
            own = {
                "NUM_HEADS": heads,
                "HEAD_DIM": head_dim,
                "BLOCK_D": block_d,
                "WINDOW": window,
                "BLOCK_N": block_n,
                "STARTS": not window,
            }
            report(gpu, name, decode_attention._combine, own, 1)
            report_cascade(gpu, name, Layer(heads, num_kv_heads, head_dim, 1.0), shape, memory)
            constants = {
                **shape,
                "NUM_HEADS": heads,
                "PACKED_HEADS": prefill_attention.packed_heads(group_size),
            }
            for paged, longest in product((True, False), (100, 8000)):
                described = gpu >= 90 and head_dim == block_d
                tile = prefill_attention.prefill_tile(head_dim, 2, memory, longest, paged, described)
                own = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "NUM_STAGES": tile.num_stages}
                own |= {"DESCRIBED": described, "PAGED": paged, "PAGE_SIZE": 256 if paged else 1}
                types = {}
                if described:
                    types = dict.fromkeys(("keys", "values"), f"tensordesc<bf16[{tile.block_n}, {head_dim}]>")
                whole = {**constants, **own, **PLAIN, "starts": None, "lse": None}
                kernel, turn = prefill_attention._prefill, {"registers": tile.registers, "in_turn": True}
                report(gpu, name, kernel, whole, tile.num_warps, types, **turn)
                if paged and not window:
                    report(gpu, name, kernel, {**constants, **own, **PLAIN}, tile.num_warps, types, **turn)
            if gpu >= FIRST_WITH_FP8:
                own = {"NUM_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "PAGE_SIZE": 256, "BLOCK_D": block_d}
                own["BLOCK_H"] = triton.next_power_of_2(num_kv_heads)
                own["BLOCK_ROWS"] = fp8_pages.WIDENED_ROWS
                report(gpu, name, fp8_pages._write_quantized, own, 4, FP8)
                report(gpu, name, fp8_pages._widen, own, 4, FP8)
        report(gpu, "any", small_kernels._likeliest_allowed, {"BLOCK": 4096}, 8)
        report_experts(gpu, memory)
    report_long_prefill()


def report_long_prefill() -> None:
    """As in llama, over pages."""
    heads, num_kv_heads, head_dim, *_ = SHAPES["llama"]
    block_n = prefill_hopper.BLOCK_N
    layout = gl.NVMMASharedLayout.get_default_for([block_n, head_dim], gl.bfloat16)
    described = f"tensordesc<bf16[{block_n}, {head_dim}],{layout!r}>"
    constants = {
        "NUM_HEADS": heads,
        "GROUP_SIZE": heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "PAGED": True,
        "PAGE_SIZE": 256,
        "BLOCK_M": prefill_hopper.BLOCK_M,
        "BLOCK_N": block_n,
        "NUM_STAGES": prefill_hopper.NUM_STAGES,
    }
    types = dict.fromkeys(("keys", "values"), described)
    report(90, "llama", prefill_hopper._prefill_long, constants, prefill_hopper.WARPS, types)


def report_experts(gpu: int, memory: int) -> None:
    """As in Qwen3-30B-A3B, in gpt-oss, whose weights are transposed, and in fp8."""
    routed = {"EXPERTS": 128, "PER_TOKEN": 8, "BLOCK": 8, "AMONG_CHOSEN": True}
    report(gpu, "any", experts_kernels._route, routed, 1)
    report(gpu, "any", expert_groups._count, {"EXPERTS": 128, "CHUNK": 128}, 4)
    report(gpu, "any", expert_groups._scan, {"BLOCK": 256}, 1)
    report(gpu, "any", expert_groups._place, {"EXPERTS": 128, "CHUNK": 128, "BLOCK_M": 64}, 4)
    for rows, transposed, fp8 in product((8, 32, 1000), (False, True), (False, True)):
        if fp8 and (transposed or gpu < 89):
            continue
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        tile = experts_kernels.tile_for(128 * rows, 128, dtype, memory)
        described = gpu >= 90 and not transposed and not tile.swapped
        gate = {"GATE": "clamped" if transposed else "silu", "INTERLEAVED": transposed, "BIAS": transposed}
        constants = {
            "SCALED": fp8,
            "SWAPPED": tile.swapped,
            "DESCRIBED": described,
            "EVEN": True,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.features,
            "NUM_STAGES": tile.stages,
            "PRECISION": "tf32",
            "column_stride" if transposed else "feature_stride": 1,
        }
        types = {"x": "fp8e4nv", "weight": "fp8e4nv"} if fp8 else {}
        kernel = experts_kernels._grouped_product
        if described:
            element = "fp8e4nv" if fp8 else "bf16"
            types["weight"] = f"tensordesc<{element}[1, 2, {tile.columns // 2}, {tile.features}]>"
            report(gpu, "any", kernel, {**constants, **gate}, tile.warps, types)
            types["weight"] = f"tensordesc<{element}[1, 1, {tile.columns}, {tile.features}]>"
            types["x"] = f"tensordesc<{element}[{tile.rows}, {tile.features}]>"
            own = {**constants, "BLOCKS": 132, "FEATURES": 768}
            report(gpu, "any", experts_persistent._persistent_product, own, tile.warps, types)
        else:
            report(gpu, "any", kernel, {**constants, **gate}, tile.warps, types)
            report(gpu, "any", kernel, {**constants, **gate, "GATE": ""}, tile.warps, types)
    if gpu >= 89:
        report(
            gpu,
            "any",
            experts_kernels._quantize,
            {"MOST": 448.0, "BLOCK": 1024},
            4,
            {"out": "fp8e4nv", "scale": "fp32"},
        )


def report_cascade(gpu: int, name: str, layer: Layer, shape: dict[str, Any], memory: int) -> None:
    block_d = shape["BLOCK_D"]
    common = {"HEAD_DIM": layer.head_dim, "BLOCK_D": block_d, "MEMBER": cascade.MEMBER_WIDTH}
    for queries in cascade_attention.query_blocks(layer):
        block_n, num_stages = online_softmax.fitting_blocks(
            cascade_attention.CASCADE_BLOCKS, queries, 2 * block_d, memory
        )
        own = {
            **common,
            "GROUP_SIZE": shape["GROUP_SIZE"],
            "SOFTCAP": shape["SOFTCAP"],
            "NUM_KV_HEADS": layer.kv_heads,
            "PAGE_SIZE": 256,
            "BLOCK_M": queries,
            "BLOCK_N": block_n,
            "NUM_STAGES": num_stages,
            "ITEM": cascade.ITEM_WIDTH,
        }
        warps = cascade_attention.CASCADE_WARPS
        report(gpu, name, cascade_attention._attend_prefixes, {**own, **PLAIN}, warps)
        if gpu >= FIRST_WITH_FP8:
            report(gpu, name, cascade_attention._attend_prefixes, own, warps, FP8)
    report(gpu, name, cascade_attention._merge_prefixes, {**common, "NUM_HEADS": layer.query_heads}, 1)


def check_names() -> None:
    """Triton ignores names that no argument has, and then compiles a variant for each value that it meets."""
    for kernel in [
        one
        for module in (
            cascade_attention,
            decode_attention,
            prefill_attention,
            prefill_hopper,
            fp8_pages,
            small_kernels,
            experts_kernels,
            expert_groups,
            experts_persistent,
        )
        for one in vars(module).values()
    ]:
        if isinstance(kernel, triton.JITFunction):
            named = {*(kernel.do_not_specialize or ()), *(kernel.do_not_specialize_on_alignment or ())}
            assert named <= set(kernel.arg_names), (kernel.__name__, named)


def is_its_turn(gpu: int, model: str) -> bool:
    """Whether this GPU is the one for which the model's next variant is compiled."""
    if model == "any":
        return True
    variants[gpu, model] += 1
    return (variants[gpu, model] + [*SHAPES].index(model)) % len(GPUS) == [*GPUS].index(gpu)


def report(
    gpu: int,
    model: str,
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    types: dict[str, str] | None = None,
    registers: int | None = None,
    in_turn: bool | None = None,
) -> None:
    """Compiles a variant. Those of other types than most are compiled for each GPU, unless it is said that they are
    `in_turn`."""
    if (not types if in_turn is None else in_turn) and not is_its_turn(gpu, model):
        return
    signature, attributes = {}, {}
    pointers = POINTERS | (types or {})
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        type_name = pointers.get(name, "")
        if type_name and not type_name.startswith("tensordesc"):
            type_name = f"*{type_name}"
        signature[name] = type_name or NUMBERS.get(name, "i32")
        if name not in NUMBERS:
            attributes[(place,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    told = {"gpu": gpu, "kernel": kernel.__name__, "model": model, "shared": compiled.metadata.shared}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
