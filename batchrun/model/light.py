"""transformers without torch, for processes that only make prompts: torch is two of the three seconds of a start."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from batchrun.imports import distributions_on_demand, hidden

# Set for processes that are batchrun's own and run no model: the command's, and the workers that it starts.
VARIABLE = "BATCHRUN_WITHOUT_TORCH"

_importing = threading.Lock()


def import_tokenizers(with_torch: bool = False) -> None:
    """Imports what opens tokenizers and configs, by one thread at a time: two would import transformers only halfway.

    It takes a second, and with torch two or more: never on an event loop. In a process that says so by `VARIABLE`,
    which no user's code shares, as where torch is not installed, unless `with_torch`; a model's own code may want it.
    """
    with _importing, distributions_on_demand(), contextlib.ExitStack() as stack:
        if VARIABLE in os.environ and not with_torch and not {"torch", "transformers"} & sys.modules.keys():
            stack.enter_context(hidden(["torch"]))
            stack.enter_context(_no_advice())
        from transformers import AutoConfig, AutoTokenizer, utils  # noqa: F401

        # It remembers the answer for the rest of the process's life.
        utils.is_torch_available()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Only errors of transformers meanwhile: the engine's process reads the same files, and its log keeps the rest."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """transformers would tell the user to install torch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
