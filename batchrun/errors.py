"""Every error that a user can meet, and the exit codes of the process.

An error says what is wrong, where, and the fix, in one line. A *fault* is an error of a single row: it stays in
the output beside the row and never stops the job.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.counters import Counters

# What Python raises for a bug in a program. Other errors may come of the data, the machine or the network.
BUGS = (TypeError, NameError, AttributeError, KeyError, ImportError)
# What these raise of that kind is their caller's bug.
BLAMELESS = {*sys.stdlib_module_names, "numpy", "pyarrow"}


class ExitCode(IntEnum):
    """What a scheduler reads off the finished process."""

    COMPLETE = 0
    FAILED = 1
    REFUSED = 2
    FAILED_ROWS = 3
    INTERRUPTED = 4


class BatchrunError(Exception):
    """Base of all errors meant for a person. Survives pickling, so it crosses process borders unchanged."""

    exit_code = ExitCode.FAILED
    counters: Counters | None = None
    """What the attempt had counted that this ended."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{where}{self.what}{fix}"


def one_line(error: BaseException) -> str:
    """An error for a person: its own words if it is meant for one, else its type and first line."""
    if isinstance(error, BatchrunError):
        return str(error)
    name, line = type(error).__name__, first_line(error)
    return line if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Refused(BatchrunError):
    """Running the same command again cannot help. Nearly always found before a model is loaded; what an earlier run, or
    this one, has staged stays."""

    exit_code = ExitCode.REFUSED


class JobError(Refused):
    """The job file itself: an unknown key, a value of the wrong type, a variable that is not set."""


class InputError(Refused):
    """The input data: no file matches, unreadable footers, schemas that differ, a column that is missing."""


class ModelError(Refused):
    """The model or tokenizer: missing, unsafe to load, or unable to do what the job asks."""


class OutputError(Refused):
    """The destination: not writable, full of foreign files, or a column name that is taken."""


class ClusterError(Refused):
    """No Dask scheduler or workers to run on."""


class ChangedError(Refused):
    """Inputs or job differ from what earlier runs into this output were made of. `where` is the output."""


class LeaseHeld(Refused):
    """Another run is writing this output right now."""


class StorageError(BatchrunError):
    """Object storage kept failing after minutes of back-off. The run can be resumed."""

    exit_code = ExitCode.INTERRUPTED


class CorruptInput(BatchrunError):
    """A data page that cannot be decoded, found while reading a partition."""


class EngineError(BatchrunError):
    """The engine could not be started, or answered with an error that is no single row's.

    Where a process ended with it by itself, `launch` is its number among those of its worker's engine, and `output`
    holds the last lines that it printed. A worker adds `fruitless`, how many of its processes in a row have
    ended now without a row that became durable; `proved`, whether this one did finish a row that it was given alone, to
    show that it works; and `refused`, whether the engine was not even tried again.
    """

    launch: int | None = None
    output: Sequence[str] = ()
    fruitless = 0
    proved = False
    refused = False


class EngineDied(EngineError):
    """The engine's process ended by itself (a crash, a kill). A new one may go on from the staged rows."""


class EngineOutOfMemory(EngineError):
    """A GPU of an engine that has several had no memory for a batch, which the others were in the middle of: never a
    row's fault. The next process gets `options` over those that this one had, smaller each time."""

    options: Mapping[str, object] = MappingProxyType({})


class EngineNotLoaded(EngineError):
    """The engine's process failed or ended before its model was loaded: never a row's fault."""


class TooManyFaults(BatchrunError):
    """The circuit breaker: too large a share of the first rows failed, so the job itself is likely wrong."""


class Interrupted(BatchrunError):
    """The run was told to stop; what was finished is safe and the same command goes on from there."""

    exit_code = ExitCode.INTERRUPTED


class Incomplete(BatchrunError):
    """Parts that were there are gone at the end of a run; the same command makes them again."""

    exit_code = ExitCode.INTERRUPTED


class InternalError(BatchrunError):
    """A bug in batchrun's own code: another attempt, machine or row changes nothing. A traceback of it ends with
    the one from where it happened, also in another process."""

    @classmethod
    def of(cls, error: BaseException, kept_by: str = "--debug") -> InternalError:
        """The error for a person, for one that `is_bug`; `kept_by` says who has the traceback."""
        told = cls(
            f"unexpected {one_line(error)}",
            _raised_in(error),
            f"this is a bug: please report it in batchrun's issues, with the traceback that is in {kept_by}",
        )
        # Notes cross borders of processes, where tracebacks are lost.
        told.add_note("".join(traceback.format_exception(error)).rstrip())
        return told


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal stopped what raised this, and nothing was told of it yet. An interrupt in a wait for a
    lock may come out of it as an error of the lock, which its caller takes for one of the store."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, KeyboardInterrupt | Interrupted):
        first = first.__cause__ or first.__context__
    return isinstance(first, KeyboardInterrupt)


def is_bug(error: BaseException) -> bool:
    """Whether batchrun's own code is to blame: an error of `BUGS` that it raised itself, or that Python, numpy or
    pyarrow raised for it. One out of other code (a model's, an engine's, a filesystem's) is not."""
    return isinstance(error, BUGS) and type(error).__module__ == "builtins" and _raised_in(error) != ""


def _raised_in(error: BaseException) -> str:
    """The file and line of batchrun's that raised the error; empty where other code did."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package not in BLAMELESS:
            return f"{module.replace('.', '/')}.py:{line}" if package == "batchrun" else ""
    return ""


class FaultCode(StrEnum):
    """Why a row has no answer. The text before the colon in the output's error column."""

    NULL_PROMPT = "NULL_PROMPT"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    INVALID_TOOLS = "INVALID_TOOLS"
    INVALID_UTF8 = "INVALID_UTF8"
    INPUT_CORRUPT = "INPUT_CORRUPT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    BAD_LOGITS = "BAD_LOGITS"
    REPEATED_TOKEN = "REPEATED_TOKEN"
    INVALID_OUTPUT = "INVALID_OUTPUT"
    INVALID_SETTING = "INVALID_SETTING"
    WORKER_CRASH = "WORKER_CRASH"


@dataclass(frozen=True, slots=True)
class RowFault:
    """One row's error: a code to group by and a message to read."""

    code: FaultCode
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def nearest(name: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the known name nearest to a misspelt one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known) or 'none'})"
