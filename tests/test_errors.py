"""An error for a person: what, where and the fix in one line, whatever was raised."""

from __future__ import annotations

import pytest

from batchrun.errors import JobError, first_line, one_line


@pytest.mark.parametrize(
    ("error", "first", "one"),
    [
        (JobError("wrong", "job.yaml", "fix it"), "job.yaml: wrong; fix it", "job.yaml: wrong; fix it"),
        (ValueError("\nwhat\nmore"), "what", "ValueError: what"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError(2, "No such file"), "[Errno 2] No such file", "FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_an_error_is_one_line_even_if_it_says_nothing(error, first, one):
    assert (first_line(error), one_line(error)) == (first, one)
