"""Continuous batching over a paged key/value pool, for causal language models.

Used by the engine's process alone. May import the rest of the engine.
"""

from batchrun.engine.paged.attention.architecture import unsupported
from batchrun.engine.paged.engine import PagedEngine

__all__ = ["PagedEngine", "unsupported"]
