"""What the environment gave to a job is shown nowhere: `${NAME}` is, and secrets are hidden in every encoding."""

from __future__ import annotations

import html
import json
import os
import re
import string
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import jinja2
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import pin
from test_secrets import check_silence

from batchrun.errors import ChangedError, JobError
from batchrun.job.job import Job
from batchrun.output import identity
from batchrun.output.identity import Identity
from batchrun.storage import Folder
from batchrun.telemetry.redact import Redactor
from jobs import batchrun, write_job

PLANTED = {
    "PLANTED_POD": "Planted\"pod'<4711>&",
    "PLANTED_PROLOGUE": "planted prologue/4711",
    "PLANTED_STOP": "planted-4711",
    "PLANTED_PRICE": "4711",
}
BASE = "input: {path: a}\nprompt: {template: '{{ text }}'}\nmodel: {name: m}\noutput: {path: b}\n"


def planted_job(folder: Path, model: Path) -> Path:
    path = write_job(folder, model, rows=4, generation={"stop": ["${PLANTED_STOP}"]})
    job = yaml.safe_load(path.read_text())
    job["cluster"] = {"price_per_gpu_hour": "${PLANTED_PRICE}"}
    path.write_text(yaml.safe_dump(job))
    return path


def handed_on(**variables: str) -> Job:
    """A job whose cluster section hands secrets on, literal ones among them."""
    os.environ.update(variables)
    try:
        return Job.parse(
            f"{BASE}cluster:\n  kubernetes:\n    image: i\n"
            "    env: {DB: '${PLANTED_POD}', LEVEL: debug, API_TOKEN: literal-4711}\n",
            ["limits.max_rows=7"],
        )
    finally:
        for name in variables:
            del os.environ[name]


def test_records_report_plan_and_job_json_have_the_job_as_it_is_written(
    tmp_path: Path, tiny_llama: Path
) -> None:
    path = planted_job(tmp_path, tiny_llama)
    for words in (["run"], ["report", "--out", str(tmp_path / "page.html")]):
        code, out, err = batchrun(words[0], str(path), *words[1:], "--json", **PLANTED)
        assert code == 0, err
        check_silence(re.sub(r"\d+\.\d+", "", out), err)
    written = {file: file.read_bytes() for file in (tmp_path / "out/_job").rglob("*") if file.is_file()}
    written[tmp_path / "page.html"] = (tmp_path / "page.html").read_bytes()
    for text in written.values():
        check_silence(re.sub(rb'(?<=")[0-9a-f]{32,}|\d+\.\d+', b"", text))
    record = json.loads(next((tmp_path / "out/_job/runs").iterdir()).read_text())
    assert record["job"]["generation"]["stop"] == ["${PLANTED_STOP}"]
    assert record["job"]["cluster"]["price_per_gpu_hour"] == "${PLANTED_PRICE}"
    assert record["job"]["engine"]["window_rows"] == 8192, "defaults are shown too"
    pinned = json.loads((tmp_path / "out/_job/job.json").read_text())
    assert pinned["settings"]["generation"]["stop"] == ["${PLANTED_STOP}"]
    assert "${PLANTED_STOP}" in (tmp_path / "page.html").read_text()
    code, _, err = batchrun("run", str(path), **{**PLANTED, "PLANTED_STOP": "other-4711"})
    assert code == 2
    assert 'generation.stop: ["${PLANTED_STOP}"] has another value in the environment' in err
    check_silence(err)


def test_what_the_cluster_section_hands_on_is_shown_as_it_is_written_and_known_as_secret() -> None:
    job = handed_on(**PLANTED)
    assert job.cluster.kubernetes is not None
    assert job.cluster.kubernetes["env"]["DB"] == PLANTED["PLANTED_POD"]
    assert job.as_written()["cluster"]["kubernetes"]["env"]["DB"] == "${PLANTED_POD}"
    assert job.as_written()["limits"]["max_rows"] == 7
    assert set(job.secrets()) == {PLANTED["PLANTED_POD"], "literal-4711"}
    check_silence(repr(job).encode())


def test_a_default_in_the_job_file_is_shown_as_it_is_written() -> None:
    from batchrun.job.written import as_written, has_variable

    assert has_variable("${DAY:-2026-01-31}")
    assert as_written({"path": "2026-01-31"}, {"path": "${DAY:-2026-01-31}"}) == {
        "path": "${DAY:-2026-01-31}"
    }


def test_a_secret_assigned_in_a_prologue_is_known_as_one() -> None:
    prologue = "job_script_prologue: ['export HF_TOKEN=hf_4711', 'module load cuda', 'export A=b']"
    job = Job.parse(f"{BASE}cluster: {{slurm: {{{prologue}}}}}")
    assert job.secrets() == ["hf_4711"]


@pytest.mark.parametrize(
    "line",
    [
        "engine: {kind: '${PLANTED_POD}'}",
        "limits: {deadline: '${PLANTED_POD}'}",
        "cluster: {slots: '${PLANTED_POD}'}",
    ],
)
def test_an_error_about_a_key_shows_it_as_it_is_written(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_POD", PLANTED["PLANTED_PROLOGUE"])
    with pytest.raises(JobError, match=r"\$\{PLANTED_POD\}") as caught:
        Job.parse(f"{BASE}{line}")
    check_silence(str(caught.value).replace("PLANTED_POD", ""))


def test_an_output_pinned_with_values_in_clear_text_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "shoes")
    folder = Folder(str(tmp_path))
    before = Identity("p", "j", {"prompt": {"template": "about shoes"}}, "m", "0")
    pin(folder, before)
    values, written = {"prompt": {"template": "about shoes"}}, {"prompt": {"template": "about ${WORD}"}}
    now = Identity("p", "j", written, "m", "0", from_environment=identity.digests(values, written))
    assert pin(folder, now) is False
    values["prompt"]["template"] = "about hats"
    other = Identity("p", "k", written, "m", "0", from_environment=identity.digests(values, written))
    with pytest.raises(ChangedError, match=r"prompt\.template: about shoes -> about \$\{WORD\}"):
        pin(folder, other)


SHOWN: dict[str, Any] = {
    "plain": lambda text: text,
    "JSON": json.dumps,
    "JSON with other letters": lambda text: json.dumps(text, ensure_ascii=False),
    "repr": repr,
    "bytes": lambda text: repr(text.encode()),
    "HTML": html.escape,
    "HTML as Jinja has it": lambda text: jinja2.Template("{{ x }}", autoescape=True).render(x=text),
    "URL": quote,
    "URL, one part": lambda text: quote(text, safe=""),
    "form": quote_plus,
    "lower case": lambda text: re.sub("%..", lambda match: match[0].lower(), quote(text, safe="")),
}
SECRETS = st.text(
    st.one_of(st.sampled_from(string.printable), st.characters(exclude_categories=["Cs"])),
    min_size=4,
    max_size=24,
).filter(lambda text: len(text.strip("b'\"<>*\\ \n")) >= 4)


@settings(max_examples=200)
@given(secret=SECRETS, once=st.sampled_from(sorted(SHOWN)), twice=st.sampled_from(sorted(SHOWN)))
def test_a_secret_is_hidden_in_every_encoding_and_in_two_of_them(secret: str, once: str, twice: str) -> None:
    redact = Redactor()
    redact.add([secret])
    for text in (SHOWN[once](secret), SHOWN[twice](SHOWN[once](secret))):
        shown = redact(f"<<{text}>>")
        assert "***" in shown
        for encode in SHOWN.values():
            assert encode(secret).strip("b'\"") not in shown.replace("***", "\n"), (text, shown)


def test_numbers_stay_numbers_whatever_their_digits_spell() -> None:
    redact = Redactor()
    redact.add(["4711"])
    assert redact.values({"rows": 4711, "text": "4711", "4711": [4711]}) == {
        "rows": 4711,
        "text": "***",
        "***": [4711],
    }
