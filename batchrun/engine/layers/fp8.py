"""Linear layers in fp8 (e4m3): weights scaled per output channel, activations per token, products on fp8 matrix units.

The format is that of dynamic per-token W8A8 checkpoints: a number is `fp8 * scale`, and each scale maps the largest
absolute value of its row to the largest that e4m3 has (Micikevicius et al., FP8 Formats for Deep Learning, 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
"""448, the largest number of the format; beyond it a conversion gives NaN."""

MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 matrix units (Ada; Hopper is 9.0)."""

FEW_ROWS = 64
"""Rows up to which our own kernel multiplies. On an H100, the four products of a layer of Llama-8B, microseconds in
bfloat16, by `torch._scaled_mm` and by ours: 16 rows 165, 116 and 91; 64 rows 169, 118 and 102; 128 rows 178, 118 and
123."""

MANY_WEIGHTS = 1 << 27
"""From so many on, products of 129 to 511 rows are padded. On an H200, those of the largest two weights of a layer of
Llama-70B, microseconds: 149 rows 262 and 123, 192 rows 233 and 117, 256 rows 188 and 89; the largest of Llama-8B, half
as large, 51 with 149 rows and with 256."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (rows, features) in fp8, and the rows' scales (rows, 1) float32: a token's, or an output channel's.

    Plain operations, so that torch.compile computes them in the kernel that makes x. A row with a number that is not
    finite has no finite numbers afterwards.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x * (FP8_MAX / largest)).to(FP8), largest / FP8_MAX


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in features) times the transposed `weight` (out features, in features) fp8, scaled per row of it by
    `weight_scale` (out features, 1) float32. The result has x's dtype."""
    rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    out: Tensor = scaled_product(rows, scale, weight, weight_scale).to(x.dtype)
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("batchrun::fp8_product", mutates_args=())
def scaled_product(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """rows (rows, in features) fp8 times the transposed weight (out features, in features) fp8, by what is the fastest
    for so many rows: an operator of its own, so that a compiled layer may run with any number of them.

    Args:
        scale: (rows, 1) float32. weight_scale: (out features, 1) float32.

    Returns:
        (rows, out features), bfloat16 on a GPU; on a CPU the same product in float32.
    """
    if not rows.is_cuda:
        return rows.float() @ weight.float().t() * scale * weight_scale.t()
    if len(rows) <= FEW_ROWS:
        from batchrun.engine.layers.fp8_kernels import few_rows_product

        return few_rows_product(rows, scale, weight, weight_scale)
    return _scaled_mm(rows, scale, weight, weight_scale)


@scaled_product.register_fake
def _(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    dtype = torch.bfloat16 if rows.is_cuda else torch.float32
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=dtype)


def scaled_product_into(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor
) -> None:
    """`scaled_product` written to `out` (rows, out features), contiguous, in whichever format that has."""
    if rows.is_cuda and len(rows) > FEW_ROWS and out.dtype == torch.bfloat16:
        _scaled_mm(rows, scale, weight, weight_scale, out)
    else:
        out.copy_(scaled_product(rows, scale, weight, weight_scale))


def _scaled_mm(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor | None = None
) -> Tensor:
    padding = padding_rows(len(rows), weight.numel()) if out is None else 0
    if padding:
        # Of any value: their results are dropped.
        rows, scale = (
            functional.pad(x.view(torch.uint8), (0, 0, 0, padding)).view(x.dtype) for x in (rows, scale)
        )
    # Accumulated as fast as the matrix units can: over 14,336 features that doubles the rounding to bfloat16, 0.17% of
    # a result, to 0.33%, where rounding to fp8 itself makes some 3%; the exact way takes up to a sixth longer.
    made: Tensor = torch._scaled_mm(
        rows, weight.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True, out=out
    )
    return made[: len(made) - padding]


def padding_rows(rows: int, weights: int) -> int:
    """Rows to add to a product of so many with so many weights: cuBLAS takes longer for some numbers of rows than for
    the next multiple of 128."""
    return -rows % 128 if 128 < rows < 512 and weights >= MANY_WEIGHTS else 0


class Fp8Linear(nn.Module):
    """A linear layer in fp8: `weight` (out features, in features), `weight_scale` (out features, 1) float32."""

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the layer's own parameters, which `quantize` or a loader then converts."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        scale = torch.empty(linear.out_features, 1, dtype=torch.float32, device=linear.weight.device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def quantize(self) -> None:
        """Converts the weight, which is in another format so far."""
        quantized, scale = quantize_rows(self.weight.data)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out features) of (..., in features)."""
        return fp8_linear(x, self.weight, self.weight_scale, self.bias)


def format_of(model: nn.Module) -> str:
    """What a model's weights are in, for people: "bfloat16", or "fp8 and bfloat16"."""
    parameters = list(model.parameters())
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return f"fp8 and {dtype}" if any(parameter.dtype == FP8 for parameter in parameters) else dtype


def unsupported_device(device: torch.device) -> str | None:
    """Why products of fp8 cannot run there, in words that follow "since"; a CPU emulates them."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    name, have = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    return f"{name} (compute capability {have}) has no fp8 matrix units, which come with 8.9 (Ada, Hopper)"
