"""The fp8 product of few rows against float32 of the same numbers: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from batchrun.engine.layers import fp8_kernels
from batchrun.engine.layers.fp8 import quantize_rows
from batchrun.engine.layers.fp8_kernels import few_rows_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(
    ("rows", "features", "columns"), [(1, 512, 128), (3, 208, 80), (20, 1024, 64), (33, 768, 192)]
)
def test_few_rows_are_multiplied_as_in_float32(
    rows: int, features: int, columns: int, splits: int | None
) -> None:
    x, weight = torch.randn(rows, features, device=DEVICE), torch.randn(columns, features, device=DEVICE)
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), quantize_rows(weight)
    want = x.float() @ weight.float().t() * x_scale * weight_scale.t()
    given = (x, x_scale, weight, weight_scale, splits)
    got = few_rows_product(*given)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2 * float(want.std()))
    # The blocks that share columns add up in an order of their own: again the same bits, and a clean slate.
    assert torch.equal(few_rows_product(*given), got)
    assert not bool(fp8_kernels._counters[x.device].any())


def test_a_row_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    x = torch.randn(4, 256, device=DEVICE)
    weight, weight_scale = quantize_rows(torch.randn(64, 256, device=DEVICE))
    whole = few_rows_product(*quantize_rows(x), weight, weight_scale)
    x[1, 3] = float("nan")
    broken = few_rows_product(*quantize_rows(x), weight, weight_scale)
    assert not bool(broken[1].isfinite().any())
    assert torch.equal(broken[[0, 2, 3]], whole[[0, 2, 3]])
