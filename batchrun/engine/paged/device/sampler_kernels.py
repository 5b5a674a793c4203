"""The engine's small GPU kernels, in Triton.

Writing and copying pages, a top-p threshold, the likeliest token that an answer may have.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchrun.engine.tokens.answer_mask import AnswerMask


@triton.jit
def _top_p(probabilities, lowest, size, top_p, OWN: tl.constexpr, BLOCK: tl.constexpr):
    row = probabilities + tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    low, high = (
        0,
        0x3F800001,
    )  # the bits of 0 and of what follows 1: in between, bits are in the floats' order
    if OWN:
        wanted = tl.load(top_p + tl.program_id(0))
        # Of a row that keeps all its tokens, none has to be looked for.
        rounds = tl.where(wanted < 1, 31, 0)
    else:
        wanted, rounds = top_p, 31
    for _ in range(rounds):
        middle = low + (high - low) // 2
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            p = tl.load(row + start + column, mask=start + column < size, other=0.0)
            mass += tl.where(p.to(tl.int32, bitcast=True) >= middle, p, 0.0)
        enough = tl.sum(mass, axis=0) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    # Rounding may keep every sum below top_p: then all tokens stay. Else the smallest that is needed.
    tl.store(lowest + tl.program_id(0), low.to(tl.float32, bitcast=True))


def top_p_threshold(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """See `sampler.top_p_threshold`: tokens at or above the result are those at or above the smallest one needed.

    `top_p` is one number, or (rows, 1) float32, each row's own. By bisection over the bits of a float, a pass over
    the row each: to sort 150,000 tokens for a thousand rows takes longer than the decode step itself.
    """
    probabilities = probabilities.contiguous()
    lowest = torch.empty(len(probabilities), 1, dtype=torch.float32, device=probabilities.device)
    own = isinstance(top_p, Tensor)
    top_p = top_p.contiguous() if isinstance(top_p, Tensor) else top_p
    _top_p[(len(probabilities),)](
        probabilities, lowest, probabilities.shape[1], top_p, OWN=own, BLOCK=4096, num_warps=8
    )
    return lowest


@triton.jit
def _likeliest_allowed(
    logits, states, mask_of, masks, tokens, size, words, stride, invalid, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    mask = masks + tl.load(mask_of + tl.load(states + row)).to(tl.int64) * words
    word, bit = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    best = tl.full((BLOCK // 32, 32), float("-inf"), tl.float32)
    token = tl.full((BLOCK // 32, 32), 0, tl.int32)
    broken = tl.full((BLOCK // 32, 32), 0, tl.int32)
    for start in range(0, words, BLOCK // 32):
        bits = tl.load(mask + start + word, mask=start + word < words, other=0)
        column = (start + word)[:, None] * 32 + bit[None, :]
        x = tl.load(line + column, mask=column < size, other=float("-inf")).to(tl.float32)
        # Neither NaN nor infinity is below infinity.
        broken |= tl.where(x < float("inf"), 0, 1)
        better = (((bits[:, None] >> bit[None, :]) & 1) != 0) & (x > best)
        best, token = tl.where(better, x, best), tl.where(better, column, token)
    top = tl.max(tl.max(best, axis=1), axis=0)
    first = tl.min(tl.min(tl.where(best == top, token, size), axis=1), axis=0)
    usable = (tl.max(tl.max(broken, axis=1), axis=0) == 0) & (top > float("-inf"))
    tl.store(tokens + row, tl.where(usable, first, invalid).to(tl.int64))


def likeliest_allowed(logits: Tensor, states: Tensor, mask: AnswerMask, invalid: int) -> Tensor:
    """(rows,) int64: each row's likeliest token of those that its state allows, the first of equals.

    `invalid` where logits are no numbers, or none that is allowed is finite. A pass over the logits and one over a bit
    for each.

    Args:
        logits: (rows, vocabulary), each row contiguous.
        states: (rows,) int32.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _likeliest_allowed[(len(logits),)](
        logits, states, mask.mask_of, mask.masks, tokens, logits.shape[1], mask.masks.shape[1], logits.stride(0),
        invalid, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return tokens
