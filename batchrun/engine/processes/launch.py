"""How an engine's process is started, and with what it may compute."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

PR_SET_PDEATHSIG = 1
# Found before any fork: a child of a process with other threads may not look for it.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def start(descriptor: int, env: dict[str, str], kind: str = "") -> subprocess.Popen[bytes]:
    """Starts a process that serves an engine over the inherited socket `descriptor`. Its output, both streams in one,
    is a pipe that reads do not wait for; `env` is added to its environment. With `kind` it imports what that kind of
    engine needs before it is asked for one."""
    # Not multiprocessing: a Dask worker may be daemonic, and its children would import the user's __main__ again.
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrun.engine.server", str(descriptor), str(os.getpid()), kind],
        env=environment() | env,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_thread,
    )
    os.set_blocking(cast(IO[bytes], process.stdout).fileno(), False)
    return process


def environment() -> dict[str, str]:
    """The worker's own, less what a Dask nanny sets for a worker's sake and costs a model dearly: one thread for
    each library, and an allocator that hands every large tensor's memory back to the kernel."""
    threads = str(available_cores())
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_TRIM_THRESHOLD_"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }


def available_cores() -> int:
    """CPU cores that this process may use, a container's quota (cgroup v2) included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        # "max" is no number: no quota.
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def die_with_thread() -> None:
    """The kernel kills this process when the thread that started it ends (Linux, prctl(2)). Between fork and exec: one
    that is paused before it runs a line of Python would else be left behind."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """As `die_with_thread`, in the program itself, which ends if its parent has ended before."""
    die_with_thread()
    if os.getppid() != parent:
        os._exit(0)
