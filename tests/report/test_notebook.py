"""In a notebook a run shows a progress bar, unless it is told not to."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import batchrun as library
from batchrun.report import notebook
from batchrun.report.result import RunResult
from jobs import write_job


@pytest.fixture
def kernel(monkeypatch) -> None:
    """As in a Jupyter kernel without widgets."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_notebook_is_known_by_its_kernel(monkeypatch, kernel):
    assert notebook.in_notebook()
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={}))
    )
    assert not notebook.in_notebook(), "IPython on a terminal"
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.in_notebook()


def test_a_run_in_a_notebook_shows_a_bar_with_its_rows(tmp_path, tiny_llama, cluster, kernel, capsys):
    seen = []
    library.run(write_job(tmp_path, tiny_llama), client=cluster, on_progress=seen.append)
    shown = capsys.readouterr().err
    assert f"{tmp_path.name} 100%" in shown
    assert "60 of 60 rows" in shown
    assert seen, "the caller's own watch is called too"


def test_progress_false_turns_the_bar_off(tmp_path, tiny_llama, cluster, kernel, capsys):
    library.run(write_job(tmp_path, tiny_llama), client=cluster, progress=False)
    assert "60 of 60 rows" not in capsys.readouterr().err


def test_elsewhere_there_is_no_bar(tmp_path, tiny_llama, cluster, capsys):
    library.run(write_job(tmp_path, tiny_llama), client=cluster)
    assert "60 of 60 rows" not in capsys.readouterr().err


def test_a_result_is_shown_in_one_line_without_secrets():
    result = RunResult(
        "s3://lake/out", 1200, 1199, 1, 3, 9, 9, {}, {}, 61.25, storage_options={"key": "hidden"}
    )
    assert repr(result) == (
        "<RunResult: 1,199 of 1,200 rows answered, 1 failed in 3 parts, 61.2 s: s3://lake/out/data>"
    )
