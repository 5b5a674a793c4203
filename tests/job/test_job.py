"""The job file's promises: what is wrong is named, with the nearest right word; what is right never changes."""

from __future__ import annotations

import contextlib
import pickle
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import BatchrunError, JobError
from batchrun.hashing import stable_hash
from batchrun.job.job import Job
from batchrun.job.output import OUTPUT_COLUMNS, OutputSettings
from batchrun.job.settings import ClusterSettings
from batchrun.telemetry.redact import Redactor

BASE = """
input:
  path: s3://bucket/in/
  storage_options: {key: AKIAPLANTED, secret: planted-secret-value, client_kwargs: {endpoint_url: "http://x:1"}}
prompt: {template: "Say {{ text }}"}
model: {name: org/model}
output: {path: s3://bucket/out}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "generatoin: {}", "unknown key generatoin, did you mean 'generation'?"),
        (BASE + "generation: {max_new_token: 3}", "did you mean 'max_new_tokens'?"),
        (
            BASE + "cluster: {address: 'tls://h:1', tls: {caa: x}}",
            "unknown key cluster.tls.caa, did you mean 'ca'?",
        ),
        (
            BASE.replace("template: ", "messages: [{rol: user, content: x}]} #"),
            "unknown key prompt.messages.0.rol, did you mean 'role'?",
        ),
        (BASE + "engine: {kind: vllm}", "use auto, padded, paged, or module:Class"),
        (BASE + "output: {path: x}", "key 'output' appears twice"),
        (BASE.replace("template:", "column: a, template:"), "exactly one of template, messages, column"),
        (BASE.replace("model: {name: org/model}", ""), "model is missing"),
        (BASE + "generation: {temperature: -1}", "generation.temperature"),
        (BASE + "generation: {stop: ['']}", "empty stop text"),
        (BASE + "output2: 1", "unknown key output2, did you mean 'output'?"),
        (BASE + "(output: 1", "unknown key (output, did you mean 'output'?"),
        ("a: [", "not valid YAML"),
        ("- 1", "a job file is a mapping"),
        ("", "a job file is a mapping"),
        ("1: 2", "is not text"),
        ("a: &a [*a]", "job"),
    ],
)
def test_a_wrong_job_file_is_one_line_that_names_what_and_where(text, expected):
    with pytest.raises(JobError) as caught:
        Job.parse(text, where="job.yaml")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("job.yaml")
    assert "\n" not in str(caught.value)


def test_an_unset_variable_is_named_and_a_set_one_filled_in(monkeypatch):
    text = BASE.replace("s3://bucket/in/", "s3://bucket/${DAY_OF_RUN}/")
    with pytest.raises(JobError, match="DAY_OF_RUN is not set"):
        Job.parse(text)
    monkeypatch.setenv("DAY_OF_RUN", "2026-01-31")
    assert Job.parse(text).input.path == "s3://bucket/2026-01-31/"


def test_set_overrides_any_key_and_a_date_stays_text():
    job = Job.parse(BASE, ["input.path=2026-01-31", "generation.max_new_tokens=7", "generation.stop=[a, b]"])
    assert (job.input.path, job.generation.max_new_tokens, job.generation.stop) == (
        "2026-01-31",
        7,
        ["a", "b"],
    )
    with pytest.raises(JobError, match="is not an override"):
        Job.parse(BASE, ["generation.max_new_tokens"])
    with pytest.raises(JobError, match="did you mean"):
        Job.parse(BASE, ["generation.max_new_tokns=7"])


def test_relative_paths_start_at_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    text = BASE.replace("s3://bucket/in/", "data/*.parquet").replace("org/model", "model")
    (tmp_path / "job.yaml").write_text(text.replace("s3://bucket/out", "out"))
    monkeypatch.chdir("/")
    job = Job.load(tmp_path / "job.yaml")
    assert job.input.path == str(tmp_path / "data/*.parquet")
    assert job.model.name == str(tmp_path / "model")
    assert job.output.path == str(tmp_path / "out")


def test_a_missing_or_binary_job_file_is_a_job_error(tmp_path):
    with pytest.raises(JobError, match="cannot read"):
        Job.load(tmp_path / "none.yaml")
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot read"):
        Job.load(tmp_path / "job.yaml")


def test_places_and_budgets_do_not_change_what_decides_the_outputs():
    plain = stable_hash(Job.parse(BASE).deciding())
    same = [
        "engine.cache_dtype=auto",
        "output.path=elsewhere",
        "engine.batch_tokens=64",
        "cluster.workers=3",
        "output.flush_rows=1",
    ]
    assert stable_hash(Job.parse(BASE, same).deciding()) == plain
    for change in (
        "generation.temperature=0.7",
        "prompt.template=x{{ text }}",
        "input.limit=5",
        "model.dtype=float16",
        "model.quantization=fp8",
        "engine.cache_dtype=fp8",
    ):
        assert stable_hash(Job.parse(BASE, [change]).deciding()) != plain


CHAT = BASE.replace("template: ", "messages: [{role: user, content: '{{ text }}'}]} #")


def test_a_job_of_an_earlier_version_keeps_its_identity() -> None:
    chat = """
input: {path: s3://bucket/in/}
prompt: {messages: [{role: system, content: Be brief.}, {role: user, content: "{{ text }}"}]}
model: {name: org/model}
output: {path: s3://bucket/out}
"""
    # As version 0.2.0 had it, but for prompt.special_tokens.
    known = "9398972fe9cc091c452ed425b3c365a70bbea6730ba3500076fd5d5c5381100c"
    assert stable_hash(Job.parse(chat).deciding()) == known


@pytest.mark.parametrize(
    "change",
    [
        "prompt.template_kwargs={enable_thinking: false}",
        "prompt.tools=[{name: now}]",
        "prompt.tools={column: tools}",
        "prompt.messages=[{role: user, content: [{type: text, text: '{{ text }}'}]}]",
        "prompt.messages=[{role: user, content: '{{ text }}'}, {role: assistant, content: 'So'}]",
        "answer.reasoning=thoughts",
        "answer={reasoning: thoughts, reasoning_markers: [<a>, </a>]}",
    ],
)
def test_what_a_chat_template_gets_and_what_an_answer_becomes_is_part_of_the_job(change: str) -> None:
    one, other = (Job.parse(CHAT, changes).deciding() for changes in ([], [change]))
    assert stable_hash(one) != stable_hash(other)


def test_the_order_of_a_tools_keys_is_part_of_the_job() -> None:
    one, other = (
        Job.parse(CHAT, [f"prompt.tools=[{{{keys}}}]"]).deciding()
        for keys in ("name: now, description: x", "description: x, name: now")
    )
    assert stable_hash(one) != stable_hash(other)


def test_jobs_that_share_an_output_section_have_columns_of_their_own() -> None:
    output = OutputSettings(path="out")
    sections = {"input": {"path": "in"}, "prompt": {"column": "t"}, "model": {"name": "m"}, "output": output}
    thinking = pickle.loads(pickle.dumps(Job(**sections, answer={"reasoning": "why"})))
    names = [thinking.output.column(name) for name in thinking.output.answer_columns]
    assert names[-2:] == ["why", "why_tokens"]
    assert "reasoning" not in Job(**sections).output.answer_columns
    assert "reasoning" not in output.answer_columns


def test_secrets_are_in_no_repr_no_hash_input_and_no_redacted_text():
    job = Job.parse(BASE)
    assert set(job.secrets()) == {"AKIAPLANTED", "planted-secret-value"}
    for text in (repr(job), str(job), str(job.deciding())):
        assert "planted-secret-value" not in text
        assert "AKIAPLANTED" not in text
    redact = Redactor()
    redact.add(job.secrets())
    shown = redact("denied for AKIAPLANTED / planted-secret-value at s3://me:hunter2@host/x")
    assert shown == "denied for *** / *** at s3://***@host/x"


def test_errors_survive_the_way_between_processes():
    error = JobError("what", "where", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (JobError, "where: what; fix", 2)


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1))
def test_a_job_file_changed_at_random_is_a_job_or_a_typed_error(seed):
    rng = random.Random(seed)
    text = list(BASE)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text))
        text[at : at + rng.randint(0, 3)] = rng.choices(
            string.printable + "é\x00{}[]&*!|>", k=rng.randint(0, 3)
        )
    with contextlib.suppress(BatchrunError):
        assert Job.parse("".join(text)).output.path


def test_aliases_that_multiply_are_refused_and_honest_ones_work() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
    )
    for text in (bomb, "a: &a [*a]\n"):
        with pytest.raises(
            JobError, match=r"job:1: not valid YAML \(its aliases stand for more than 100,000"
        ):
            Job.parse(text)
    options = "storage_options: &store {key: abcd}"
    job = Job.parse(
        f"input: {{path: in, {options}}}\nprompt: {{template: '{{{{ t }}}}'}}\nmodel: {{name: m}}\n"
        "output: {path: out, storage_options: *store}\n"
    )
    assert job.output.storage_options == job.input.storage_options == {"key": "abcd"}


@pytest.mark.parametrize("port", [0, 65536, "", "x:", "host", "1.2.3.4:0"])
def test_a_metrics_port_is_a_port_or_an_address_with_one(port: object) -> None:
    with pytest.raises(ValueError, match="ADDRESS:PORT"):
        ClusterSettings(metrics_port=port)


def test_a_variable_may_have_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE.replace("s3://bucket/in/", "s3://bucket/day=${DAY:-2026-01-01}/${PART:-}")
    monkeypatch.delenv("DAY", raising=False)
    assert Job.parse(text).input.path == "s3://bucket/day=2026-01-01/"
    monkeypatch.setenv("DAY", "")
    assert Job.parse(text).input.path == "s3://bucket/day=2026-01-01/"
    monkeypatch.setenv("DAY", "2026-02-02")
    assert Job.parse(text).input.path == "s3://bucket/day=2026-02-02/"
    monkeypatch.delenv("DAY")
    with pytest.raises(JobError, match=r"DAY is not set; export DAY=\.\.\., or write \$\{DAY:-default\}"):
        Job.parse(BASE.replace("s3://bucket/in/", "${DAY}"))


def test_columns_that_a_job_asks_for_have_names_and_outputs_that_ask_for_none_go_on():
    plain = Job.parse(BASE)
    assert "answer" not in plain.deciding()
    assert plain.output.answer_columns == list(OUTPUT_COLUMNS)
    asked = Job.parse(BASE, ["answer.logprobs=0", "output.columns={answer: label}"])
    assert asked.output.columns == {
        "answer": "label", "logprobs": "label_logprobs", "mean_logprob": "label_mean_logprob",
    }  # fmt: skip
    named = Job.parse(BASE, ["answer.logprobs=2", "output.columns={logprobs: lp}"])
    assert [named.output.column(name) for name in named.output.answer_columns[-3:]] == [
        "lp", "answer_top_logprobs", "answer_mean_logprob",
    ]  # fmt: skip
    assert len({stable_hash(one.deciding()) for one in (plain, asked, named)}) == 3
    with pytest.raises(JobError, match="logprobs is written where"):
        Job.parse(BASE, ["output.columns={logprobs: lp}"])
