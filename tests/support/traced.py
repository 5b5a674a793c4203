"""torch.compile as far as tracing goes: which graphs there are, without C++ that takes half a minute to compile.

What Inductor makes of a layer, tests/engine/test_paged_engine.py holds.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, in this test."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
