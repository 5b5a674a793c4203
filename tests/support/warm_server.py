"""The process that others are forked off, see `warm`: `warm_server.py KIND SESSION NAME`."""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from warm import COMMANDS, NUMBER, PROGRAMS, REQUEST_BYTES, STANDARD, fork_all

# Above all numbers at which a process wants to have them.
OUT_OF_THE_WAY = 512


class Warm:
    """The process that others are forked off."""

    def __init__(self, kind: str, session: int, name: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{name}-{kind}")
        except OSError:
            # Somebody else has started one.
            sys.exit()
        self._listener.listen(64)
        self._session = os.pidfd_open(session)
        self._woken, self._wakes = os.pipe()
        for end in (self._woken, self._wakes):
            os.set_blocking(end, False)
        self._children: dict[int, tuple[socket.socket, bool]] = {}

    def serve(self) -> None:
        """Forks what it is asked for, until the session has ended."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes)
        while True:
            bound = [asker for asker, ends_with_asker in self._children.values() if ends_with_asker]
            ready, _, _ = select.select([self._session, self._woken, self._listener, *bound], [], [])
            if self._session in ready:
                os._exit(0)
            if self._woken in ready:
                os.read(self._woken, 4096)
            for pid, (asker, _) in self._children.items():
                if asker in ready:
                    os.kill(pid, signal.SIGKILL)
            self._tell_of_the_dead()
            if self._listener in ready:
                self._fork()

    def _fork(self) -> None:
        asker, _ = self._listener.accept()
        said, descriptors, _, _ = socket.recv_fds(asker, REQUEST_BYTES, 64)
        if not said:
            # It has ended meanwhile.
            asker.close()
            return
        request = json.loads(said)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (self._listener, asker, *(other for other, _ in self._children.values())):
                one.close()
            for number in (self._session, self._woken, self._wakes):
                os.close(number)
            _become(request, descriptors)
        for number in descriptors:
            os.close(number)
        self._children[pid] = asker, "program" in request
        self._tell(asker, pid)

    def _tell_of_the_dead(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            asker, _ = self._children.pop(pid)
            with asker:
                self._tell(asker, os.waitstatus_to_exitcode(status))

    @staticmethod
    def _tell(asker: socket.socket, number: int) -> None:
        try:
            asker.send(NUMBER.pack(number))
        except OSError:
            # Whoever asked has ended before.
            return


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Leaves this process what a program that was started would have, runs that, and ends."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, OUT_OF_THE_WAY) for number in descriptors]
    for number in descriptors:
        os.close(number)
    for number, at in zip(high, request["at"], strict=True):
        os.dup2(number, at, inheritable=at in STANDARD)
        os.close(number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    searched = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in searched if path and path not in sys.path]
    os.getppid = lambda: request["asker"]
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    code: int | str | None = 0
    try:
        _run(request)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _run(request: dict[str, Any]) -> None:
    if "program" in request:
        sys.argv = request["program"]
        importlib.import_module(sys.argv[0]).main()
    elif "spawned" in request:
        fork_all()
        sys.argv = ["-c", "--multiprocessing-fork"]
        exec(request["spawned"], {})
    else:
        if request["session"]:
            os.setsid()
        if request["forks"]:
            fork_all()
        import dask

        # It has read the environment when it was imported.
        dask.config.refresh()
        sys.argv = request["module"]
        sys.path.insert(0, request["cwd"])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _import_commands() -> None:
    """What drivers and workers import, as they do: without torch."""
    from batchrun.model import light

    os.environ[light.VARIABLE] = "1"
    light.import_tokenizers()
    import batchrun

    for package in ("commands", "driver", "worker", "cluster", "report", "output", "estimate", "telemetry"):
        folder = os.path.join(os.path.dirname(batchrun.__file__), package)
        for module in pkgutil.iter_modules([folder]):
            # What bench measures, it imports with torch.
            if module.name not in ("bench", "roofline"):
                importlib.import_module(f"batchrun.{package}.{module.name}")
    for module in ("dask.cli", "distributed.cli.dask_scheduler", "distributed.cli.dask_worker"):
        importlib.import_module(module)
        # It is to run as the main one.
        del sys.modules[module]


def _import_engines() -> None:
    from batchrun.engine.choose import preload

    for program in PROGRAMS:
        importlib.import_module(program)
    preload("padded")
    preload("paged")


def main() -> None:
    """Imports, and then forks."""
    kind, session, name = sys.argv[1:]
    warm = Warm(kind, int(session), name)
    _import_commands() if kind == COMMANDS else _import_engines()
    # Threads of Python's: Arrow's allocator has one of its own, and knows of forks.
    assert threading.active_count() == 1, "a fork would leave a thread behind"
    gc.collect()
    gc.freeze()
    warm.serve()


if __name__ == "__main__":
    main()
