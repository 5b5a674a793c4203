"""What the documentation says is so: its commands run, its job files parse, its tables are the code's."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner

from batchrun import errors
from batchrun.cli import app
from batchrun.cluster.config import worker_environment
from batchrun.cluster.kubernetes import kubernetes_spec
from batchrun.cluster.slurm import slurm_options
from batchrun.errors import BatchrunError, ExitCode, FaultCode
from batchrun.job.job import Job
from batchrun.job.settings import ClusterSettings, EngineSettings

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "jobs/README.md",
    ROOT / "jobs/ERRORS.md",
    ROOT / "jobs/PERFORMANCE.md",
    ROOT / "docker/README.md",
    ROOT / "batchrun/output/README.md",
    ROOT / "batchrun/engine/README.md",
    ROOT / "batchrun/ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
]


def commands(page: Path) -> Iterator[str]:
    """Commands on indented lines, `a && b` taken apart, environment variables in front left out."""
    for line in re.findall(r"^    (\S.*)$", page.read_text(), re.MULTILINE):
        for command in line.split(" && "):
            yield re.sub(r"^(\w+=\S+ )+", "", command.strip())


def batchrun_commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in [*PAGES, *sorted((ROOT / "jobs").rglob("*.yaml"))]:
        text = page.read_text()
        lines = (
            commands(page) if page.suffix == ".md" else re.findall(r"^#   (batchrun .+)$", text, re.MULTILINE)
        )
        for line in lines:
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                if words and Path(words[0]).name == "batchrun" and len(words) > 1:
                    found.append((str(page.relative_to(ROOT)), words[1:]))
    return found


def test_every_batchrun_command_in_the_docs_is_one_with_options_that_exist() -> None:
    group = typer.main.get_command(app)
    seen = batchrun_commands()
    assert len(seen) > 15
    for page, words in seen:
        if words[0].startswith("--"):
            continue
        command = group.commands.get(words[0])  # type: ignore[attr-defined]
        assert command is not None, f"{page}: {words}"
        context = command.make_context(words[0], words[1:])
        path = context.params.get("job_file")
        if path is None or str(path) == "job.yaml":
            continue
        assert (ROOT / path).exists(), f"{page}: {words}"
        Job.load(ROOT / path, context.params["overrides"])


@pytest.mark.timeout(600)
def test_the_newcomers_commands_run_as_printed_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As printed but for the engine, the number of orders and the place. The example jobs have tests of their own.
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("answers"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = ["--set", "engine.kind=batchrun.engine.instant:InstantEngine"]
    seen = []
    for page, words in batchrun_commands():
        if page != "jobs/README.md" or not {"job.yaml", "jobs/quickstart/job.yaml"} & set(words):
            continue
        sets = [] if words[0] == "init" else [*engine]
        if "jobs/quickstart/job.yaml" in words:
            # Its answers are prompts, and no JSON.
            sets += ["--set", "input.limit=4", "--set", "answer={}"]
        words = [word.replace("/tmp", str(tmp_path)) for word in words]
        result = CliRunner().invoke(app, [*words, *sets])
        seen.append((words[0], result.exit_code))
        assert "left to do" not in result.output, f"{words}: {result.output}"
    first = [("plan", 0), ("run", 0), ("verify", 0)]
    own_data = [("init", 0), ("plan", 0), ("run", 0)]
    failed_rows = [("run", ExitCode.FAILED_ROWS), ("retry", 0)]
    assert seen == [*first, *own_data, *failed_rows]


def test_an_error_is_one_line_with_place_and_fix_and_debug_adds_the_traceback(tmp_path: Path) -> None:
    short = CliRunner().invoke(app, ["plan", str(tmp_path / "none.yaml")])
    assert short.exit_code == ExitCode.REFUSED
    assert short.stderr.count("\n") == 1
    assert "none.yaml: cannot read the job file" in short.stderr
    assert "give the path of a YAML file" in short.stderr
    long = CliRunner().invoke(app, ["plan", str(tmp_path / "none.yaml"), "--debug"])
    assert "Traceback" in long.stderr
    assert long.stderr.endswith(short.stderr)


def test_paths_and_links_in_the_docs_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:tests|jobs|docker|batchrun)/[\w./-]+\w)`", text):
            assert (ROOT / path).exists() or "answers" in path, f"{page.name}: {path}"


def test_nothing_tells_anybody_to_install_the_package_of_another_owner() -> None:
    # The index has a `batchrun` that is not this one.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "batchrun-llm"
    own = re.compile(r"pip install (-\S+ )*'?batchrun|\bbatchrun\[\w+[,\]]")
    folders = ("batchrun", "docker", "jobs", "tests")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    texts = [file for file in files if file.suffix in {".py", ".md", ".toml", ".yaml", ".sh", ".Dockerfile"}]
    assert len(texts) > 100
    found = [str(file) for file in texts if file != Path(__file__) and own.search(file.read_text())]
    assert not found


def test_the_readme_is_read_in_minutes_and_shows_what_a_run_looks_like() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1000
    assert len(re.findall(r"^!\[.+\]\((jobs/images/\S+)\)$", text, re.MULTILINE)) == 2
    torch = re.search(r"install '(torch\S+)' --index-url \S+/cpu", text)
    assert torch
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert torch[1] in project["dependencies"]
    assert f"'{torch[1]}' --index-url" in (ROOT / "jobs/README.md").read_text()


def test_the_rows_that_the_readme_shows_are_the_quickstarts() -> None:
    text = (ROOT / "README.md").read_text()
    header = re.search(r"^\| text \|(.*)\|$", text, re.MULTILINE)
    assert header
    fields = re.findall(r"`(\w+)`", header[1])
    lines = text[header.end() :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    orders = pq.read_table(ROOT / "jobs/quickstart/orders.parquet", columns=["text", "expected"]).to_pylist()
    known = {order["text"]: json.loads(order["expected"]) for order in orders}
    assert len(rows) == 3
    for text, *cells in rows:
        assert ["" if known[text][name] is None else str(known[text][name]) for name in fields] == cells


def test_a_change_of_a_known_kind_touches_at_most_six_files_which_exist() -> None:
    text = (ROOT / "batchrun/ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| (an? .+?) \| (.+) \|$", text.partition("## Where to add what")[2], re.MULTILINE)
    assert len(rows) >= 7
    for change, cell in rows:
        files = re.findall(r"`([\w/]+(?:\.\w+|/))`", cell)
        assert 1 <= len(files) <= 6, change
        for file in files:
            assert (ROOT / file).exists() or (ROOT / "batchrun" / file).exists(), f"{change}: {file}"


def test_every_package_says_which_process_uses_it_and_what_it_may_import() -> None:
    packages = {path.parent for path in (ROOT / "batchrun").rglob("*.py")} - {ROOT / "batchrun"}
    for package in packages:
        text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
        assert re.search(r"[Mm]ay\s+import", text), package
        assert re.search(r"[Uu]sed\s+by|process", text), package


def test_yaml_in_the_docs_is_what_the_code_takes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docker/README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        settings = ClusterSettings(**yaml.safe_load(block)["cluster"])
        if settings.slurm is not None:
            import dask_jobqueue

            options = {**slurm_options(settings), "scheduler_options": {"dashboard_address": ":0"}}
            with dask_jobqueue.SLURMCluster(**options) as cluster:
                assert "--gres=gpu:1" in cluster.job_script()
        else:
            assert kubernetes_spec(settings)["spec"]["worker"]["replicas"] == settings.workers


def test_the_line_for_a_worker_has_the_settings_that_batchrun_wants() -> None:
    line = next(
        line for line in (ROOT / "docker/README.md").read_text().splitlines() if "dask worker tcp" in line
    )
    words = shlex.split(line)
    for word in words[: words.index("dask")]:
        name, _, value = word.partition("=")
        assert name == "CUDA_VISIBLE_DEVICES" or worker_environment()[name] == value
    assert words[words.index("--nthreads") + 1] == str(ClusterSettings().slots)
    ran = subprocess.run(
        [sys.executable, "-m", "dask", "worker", "--help"], capture_output=True, text=True, check=True
    )
    for word in words:
        if word.startswith("--"):
            assert word in ran.stdout


def test_every_row_error_is_in_the_table_with_its_fix() -> None:
    rows = re.findall(
        r"^\| `([A-Z0-9_]+)` \| (.+?) \| (.+?) \|$", (ROOT / "jobs/ERRORS.md").read_text(), re.MULTILINE
    )
    assert {code for code, _, _ in rows} >= set(FaultCode)
    assert all(what and fix for _, what, fix in rows)


def test_every_kind_of_error_is_under_its_exit_code() -> None:
    text = (ROOT / "jobs/ERRORS.md").read_text()
    listed = {
        name: int(code)
        for code, names in re.findall(r"^\| (\d) \| (`.+?`) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    kinds = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, BatchrunError)
    }
    assert listed.items() >= kinds.items()
    assert set(listed.values()) == {ExitCode.FAILED, ExitCode.REFUSED, ExitCode.INTERRUPTED}


def test_keys_and_defaults_in_the_performance_page_are_the_codes() -> None:
    text = (ROOT / "batchrun/engine/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE)
    assert rows
    for key, shown in rows:
        default = EngineSettings.model_fields[key].default
        if default is not None and default is not True:
            assert str(default) in shown.replace(",", ""), key


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell: str) -> None:
    asked = {"COMP_WORDS": "batchrun st", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "batchrun st"}
    asked |= {"_BATCHRUN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    variables = {**os.environ, **asked}
    code = "import sys; sys.argv = ['batchrun']; from batchrun.cli import app; app(prog_name='batchrun')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False
    )
    assert "status" in ran.stdout, ran.stderr


def test_every_commands_help_has_an_example_that_parses() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        example = re.search(r"Example: batchrun (\S+) (.+)", command.epilog or "")
        assert example, f"batchrun {name} --help has no example"
        assert example[1] == name
        command.make_context(name, shlex.split(example[2]))
