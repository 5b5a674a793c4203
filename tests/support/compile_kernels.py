"""Compiles the attention kernels for GPUs, on a machine that needs none, and says what shared memory each takes.

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

from batchrun.engine.paged import attention_kernels as kernels

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
    **dict.fromkeys(("query", "key", "value", "keys", "values", "out"), "bf16"),
    **dict.fromkeys(("tables", "starts", "lengths"), "i32"),
    **{"places": "i64", "lse": "fp32", "part_out": "fp32", "part_lse": "fp32"},
}
NUMBERS = {"scale": "fp32", "softcap": "fp32"}


def main() -> None:
    for gpu, memory in GPUS.items():
        for name, (heads, kv_heads, size, window, softcap) in SHAPES.items():
            group, columns = heads // kv_heads, triton.next_power_of_2(size)
            shape = {"GROUP": group, "SIZE": size, "WINDOW": window, "SOFTCAP": softcap, "COLUMNS": columns}
            members = kernels.matrix_rows(group)
            constants = {**shape, "KV_HEADS": kv_heads, "MEMBERS": members, "PAGE": 256}
            for split, choices in ((False, kernels.DECODE_BLOCKS), (True, kernels.SPLIT_BLOCKS)):
                block, stages = kernels.fitting(choices, members, 2 * columns, memory)
                own = {"BLOCK": block, "STAGES": stages, "SPLIT": split}
                report(gpu, name, kernels._decode, {**constants, **own}, 4)
            own = {"HEADS": heads, "SIZE": size, "COLUMNS": columns, "WINDOW": window, "BLOCK": block}
            report(gpu, name, kernels._combine, own, 1)
            constants = {**shape, "HEADS": heads, "PACK": kernels.packed_heads(group)}
            for paged, longest in product((True, False), (100, 8000)):
                tile = kernels.prefill_tile(size, 2, memory, longest, paged)
                own = dict(zip(("QUERIES", "BLOCK", "STAGES"), tile, strict=False))
                own |= {"PAGED": paged, "PAGE": 256 if paged else 1}
                report(gpu, name, kernels._prefill, {**constants, **own}, tile[-1])


def report(gpu: int, model: str, kernel: Any, constants: dict[str, Any], warps: int) -> None:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{POINTERS[name]}" if name in POINTERS else NUMBERS.get(name, "i32")
        if name not in NUMBERS:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps})
    told = {"gpu": gpu, "kernel": kernel.__name__, "model": model, "shared": compiled.metadata.shared}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
