"""The error line that is picked out of what a dying engine printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from batchrun.engine.processes.last_words import LINES, error_line, last_line, lines_of

CUDA = "CUDA error: an illegal memory access was encountered"

TORCH_ABORT = """\
Loading weights: 100%|##########| 311/311 [00:01<00:00, 201.10it/s]
[rank0]:[W1124 10:21:33.114 CUDAGuardImpl.h:119] Warning: CUDA warning: an illegal memory access (function destroyEvent)
terminate called after throwing an instance of 'c10::AcceleratorError'
  what():  CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

Exception raised from c10_cuda_check_implementation at /pytorch/c10/cuda/CUDAException.cpp:44 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80 (0x7f1c2b57eb80 in /venv/lib/libc10.so)
frame #1: <unknown function> + 0x11fb7 (0x7f1c2b611fb7 in /venv/lib/libc10_cuda.so)
frame #23: <unknown function> + 0x29d90 (0x7f1c2c029d90 in /lib/x86_64-linux-gnu/libc.so.6)
frame #24: Py_RunMain + 0x232 (0x5581a8f2d2e2 in /venv/bin/python)
frame #25: _start + 0x25 (0x5581a8e6ee25 in /venv/bin/python)

"""

PYTHON = """\
Traceback (most recent call last):
  File "/venv/batchrun/engine/server.py", line 57, in serve
    self._run(spec)
    ~~~~~~~~~^^^^^^
  File "/venv/batchrun/engine/paged/decode.py", line 210, in read
    return self.tokens.tolist()
           ^^^^^^^^^^^^^^^^^^^^
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""

FAULTHANDLER = """\
Fatal Python error: Aborted

Thread 0x00007f2b8d7fa640 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait
  File "/usr/lib/python3.12/queue.py", line 180 in get

Current thread 0x00007f2c1a6fe740 (most recent call first):
  <no Python frame>

Extension modules: numpy._core._multiarray_umath, torch._C (total: 41)
Aborted (core dumped)
"""

CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'q_proj'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
vapour.Unfit
Exception ignored in: <function Pool.__del__ at 0x7f10>
Traceback (most recent call last):
  File "b.py", line 9, in __del__
AttributeError: 'NoneType' object has no attribute 'close'
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (TORCH_ABORT, CUDA),
        (PYTHON, f"torch.AcceleratorError: {CUDA}"),
        (PYTHON + TORCH_ABORT, CUDA),
        (TORCH_ABORT + FAULTHANDLER, CUDA),
        (PYTHON[PYTHON.index("torch.") :], f"torch.AcceleratorError: {CUDA}"),
        (CHAINED, "vapour.Unfit"),
        (
            "Traceback (most recent call last):\n  File 'x'\nRuntimeError: \nno room\n",
            "RuntimeError: no room",
        ),
        ("terminate called after throwing an instance of 'E'\n  what():  \nfull\n", "full"),
        ("terminate called after throwing an instance of 'E'\n  what():  std::bad_alloc\n", "std::bad_alloc"),
        ("step 1\nfree(): invalid pointer\n" + FAULTHANDLER, "free(): invalid pointer"),
        ("double free or corruption (!prev)\nAborted\n", "double free or corruption (!prev)"),
        ("corrupted size vs. prev_size\n", "corrupted size vs. prev_size"),
        ("*** stack smashing detected ***: terminated\n", "*** stack smashing detected ***: terminated"),
        (
            "python: loader.c:78: load: Assertion `n < size' failed.\n",
            "python: loader.c:78: load: Assertion `n < size' failed.",
        ),
        ("Loading weights: 100%\n" + FAULTHANDLER, "Fatal Python error: Aborted"),
        (f"\x1b[31m{'RuntimeError: red'}\x1b[0m\n", "RuntimeError: red"),
        ("10%\r20%\r30%\n", ""),
        ("", ""),
    ],
)
def test_the_error_itself_is_picked_and_nothing_that_stands_around_it(output, expected):
    assert error_line(lines_of(output)) == expected


def test_without_an_error_the_last_line_that_says_anything_is_left():
    assert last_line(lines_of("loading\r 10%\r 90%\nframe #3: main + 0x2\n\n  what():  \n")) == "90%"
    assert last_line(lines_of("Killed\n")) == ""
    assert last_line(lines_of("")) == ""


def test_a_bounded_number_of_lines_is_kept():
    assert lines_of("\n".join(map(str, range(1000)))) == [str(i) for i in range(1000 - LINES, 1000)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import faulthandler, os; faulthandler.enable(); os.abort()", "Fatal Python error: Aborted"),
        ("class Odd(BaseException): pass\nraise Odd('one\\ntwo')", "Odd: one"),
        ("def f(:\n  pass", "SyntaxError: "),
    ],
)
def test_it_reads_what_a_real_process_prints(code, expected):
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = lines_of(done.stdout.decode())
    assert error_line(lines).startswith(expected)
