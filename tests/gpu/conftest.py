"""One engine at a time: what a test leaves on the GPU goes before the next one measures what is free."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()
