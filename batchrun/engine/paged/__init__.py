"""Continuous batching over a paged key/value pool, for causal language models."""

from batchrun.engine.paged.architecture import unsupported
from batchrun.engine.paged.engine import PagedEngine

__all__ = ["PagedEngine", "unsupported"]
