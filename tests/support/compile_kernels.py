"""Compiles the kernels of attention and of answers' masks for GPUs, on a machine that needs none.

It says what shared memory each takes.

    python tests/support/compile_kernels.py

In a process of its own: where Triton interprets, it compiles nothing.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchrun.engine.paged import decode_attention, fp8_pages, online_softmax, prefill_attention
from batchrun.engine.paged import kernels as small_kernels

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
    **dict.fromkeys(("key_back", "value_back"), "bf16"),
    **dict.fromkeys(("block_tables", "cu_seqlens_q", "seq_lens"), "i32"),
    **{"logits": "bf16", "states": "i32", "mask_of": "i32", "masks": "i32", "tokens": "i64"},
    **{
        "slot_mapping": "i64",
        "lse": "fp32",
        "sinks": "bf16",
        "key_back": "bf16",
        "value_back": "bf16",
        "split_out": "fp32",
        "split_lse": "fp32",
    },
}
FIRST_WITH_FP8 = 89
# Without scales and sinks, and over pages in fp8.
PLAIN = dict.fromkeys(("key_scales", "value_scales", "sinks"))
FP8 = {
    **dict.fromkeys(("key_cache", "value_cache"), "fp8e4nv"),
    **dict.fromkeys(("key_scales", "value_scales"), "fp32"),
}
NUMBERS = {"scale": "fp32", "softcap": "fp32"}


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
                own = {"BLOCK_N": block_n, "NUM_STAGES": num_stages, "SPLIT_KV": split}
                report(gpu, name, decode_attention._decode, {**constants, **own, **PLAIN}, 4)
                if gpu >= FIRST_WITH_FP8:
                    choices = decode_attention.FP8_BLOCKS
                    block_n, num_stages = online_softmax.fitting_blocks(choices, block_m, block_d, memory)
                    own |= {"BLOCK_N": block_n, "NUM_STAGES": num_stages}
                    warps = decode_attention.decode_warps(block_d, fp8=True)
                    report(gpu, name, decode_attention._decode, {**constants, **own}, warps, FP8)
            own = {
                "NUM_HEADS": heads,
                "HEAD_DIM": head_dim,
                "BLOCK_D": block_d,
                "WINDOW": window,
                "BLOCK_N": block_n,
            }
            report(gpu, name, decode_attention._combine, own, 1)
            constants = {
                **shape,
                "NUM_HEADS": heads,
                "PACKED_HEADS": prefill_attention.packed_heads(group_size),
            }
            for paged, longest in product((True, False), (100, 8000)):
                tile = prefill_attention.prefill_tile(head_dim, 2, memory, longest, paged)
                own = dict(zip(("BLOCK_M", "BLOCK_N", "NUM_STAGES"), tile, strict=False))
                own |= {"PAGED": paged, "PAGE_SIZE": 256 if paged else 1}
                report(gpu, name, prefill_attention._prefill, {**constants, **own, **PLAIN}, tile[-1])
                if gpu >= FIRST_WITH_FP8 and paged:
                    report(gpu, name, prefill_attention._prefill, {**constants, **own}, tile[-1], FP8)
            if gpu >= FIRST_WITH_FP8:
                own = {"NUM_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "PAGE_SIZE": 256, "BLOCK_D": block_d}
                own["BLOCK_H"] = triton.next_power_of_2(num_kv_heads)
                report(gpu, name, fp8_pages._write_quantized, own, 4, FP8)
        report(gpu, "any", small_kernels._likeliest_allowed, {"BLOCK": 4096}, 8)


def check_names() -> None:
    """Triton ignores names that no argument has, and then compiles a variant for each value that it meets."""
    for kernel in [
        one
        for module in (decode_attention, prefill_attention, fp8_pages, small_kernels)
        for one in vars(module).values()
    ]:
        if isinstance(kernel, triton.JITFunction):
            named = {*(kernel.do_not_specialize or ()), *(kernel.do_not_specialize_on_alignment or ())}
            assert named <= set(kernel.arg_names), (kernel.__name__, named)


def report(
    gpu: int,
    model: str,
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    types: dict[str, str] | None = None,
) -> None:
    signature, attributes = {}, {}
    pointers = POINTERS | (types or {})
    if types and "keys" in kernel.arg_names:
        pointers |= dict.fromkeys(("keys", "values"), "fp8e4nv")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else NUMBERS.get(name, "i32")
        if name not in NUMBERS:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps})
    told = {"gpu": gpu, "kernel": kernel.__name__, "model": model, "shared": compiled.metadata.shared}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
