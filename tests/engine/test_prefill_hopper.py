"""Which prefills go to the kernel for long prompts, and what happens where Triton does not compile it.

What it computes is held against float32 on a GPU: `tests/gpu/test_paged_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from batchrun.engine.paged.attention import prefill as prefill_attention
from batchrun.engine.paged.attention import prefill_hopper
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.metadata import LONG_SEQLEN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has a kernel of its own for long prompts."""
    monkeypatch.setattr(prefill_attention, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    prefill_attention._hopper_kernel.cache_clear()
    yield
    prefill_attention._hopper_kernel.cache_clear()


def test_where_triton_does_not_compile_hoppers_kernel_long_prompts_have_the_other_and_a_note_says_so(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_hopper, "_prefill_long", None)
    monkeypatch.setattr(prefill_attention, "NOTES", [])
    layer, tokens = Layer(query_heads=2, kv_heads=2, head_dim=128, scale=0.1), 20
    query, key, value = torch.randn(3, tokens, 2, 128).to(DEVICE, DTYPE)
    ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, tokens], [tokens])]
    for _ in range(2):
        out = prefill_attention.prefill(query, key, value, None, *ints, LONG_SEQLEN, layer)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, key, value)), is_causal=True, scale=0.1
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=2e-2, rtol=2e-2)
    assert [note.partition(", since")[0] for note in prefill_attention.NOTES] == [
        "prefills of long prompts take longer"
    ]


def test_memory_that_ran_out_is_not_taken_for_a_triton_that_does_not_compile(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*layer: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(prefill_hopper, "compile_for", full)
    monkeypatch.setattr(prefill_attention, "NOTES", [])
    kind = Layer(8, 2, 128, 0.1), None, DTYPE, DEVICE
    with pytest.raises(torch.OutOfMemoryError):
        prefill_attention._hopper_kernel(*kind)
    monkeypatch.setattr(prefill_hopper, "compile_for", lambda *layer: None)
    assert prefill_attention._hopper_kernel(*kind) is prefill_hopper.prefill_long
    assert not prefill_attention.NOTES


def test_only_what_hoppers_kernel_is_made_for_goes_to_it(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_hopper, "compile_for", lambda *layer: None)
    plain = Layer(query_heads=8, kv_heads=2, head_dim=128, scale=0.1)

    def served(layer: Layer, page_size: int | None = None) -> bool:
        return (
            prefill_attention._hopper_kernel(layer, page_size, DTYPE, DEVICE) is prefill_hopper.prefill_long
        )

    assert all(served(replace(plain, query_heads=2 * group)) for group in (1, 2, 4, 8, 16))
    assert served(plain, 256)
    assert served(plain, 128)
    assert not served(plain, 64)
    others: list[dict[str, Any]] = [
        {"head_dim": 64},
        {"query_heads": 6},
        {"query_heads": 64},
        {"window": 100},
        {"softcap": 20.0},
        {"sinks": True},
    ]
    assert not any(served(replace(plain, **other)) for other in others)
