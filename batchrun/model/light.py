"""transformers without torch, for processes that only make prompts: torch is two of the three seconds of a start."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

# Set for processes that are batchrun's own and run no model: the command's, and the workers that it starts.
VARIABLE = "BATCHRUN_WITHOUT_TORCH"


def import_without_torch() -> None:
    """Imports transformers as where torch is not installed, for the rest of this process's life.

    Only in a process that says so by `VARIABLE`: it is batchrun's own, and no user's code shares it. Does nothing where
    either of them is imported already.
    """
    modules = cast(dict[str, Any], sys.modules)
    if VARIABLE not in os.environ or "torch" in modules or "transformers" in modules:
        return
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    modules["torch"], os.environ[quiet] = None, "1"
    try:
        import transformers.utils

        transformers.utils.is_torch_available()
    finally:
        del modules["torch"]
        os.environ.pop(quiet)
        if before is not None:
            os.environ[quiet] = before
