"""Hostile templates, and hostile data in honest ones: a row's error, soon, and nothing else."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pytest
from tiny import byte_tokenizer

from batchrun.errors import BatchrunError, ExitCode, FaultCode, InputError, RowFault
from batchrun.job.prompt import PromptSettings
from batchrun.prompt.renderer import KILLED, RENDERER, Renderer
from batchrun.prompt.tokens import PromptBuilder, check_sample

# Whole seconds in one call in C each, which no exception gets into.
IN_C = "{{ (big ~ 'c') in [big ~ 'd'] * 10**6 }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def render(source: str, **row: Any) -> str | RowFault:
    (answer,) = RENDERER.rows([source], list(row), [tuple(row.values())])
    return answer if isinstance(answer, RowFault) else answer[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ text.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ ('{0.__class__}'|attr('format'))(text) }}",
        "{{ range.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ [].append.__self__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ tags.append(1) }}",
        "{{ text|map('attr', '__class__')|first }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_no_template_reaches_python_or_a_file(source: str) -> None:
    answer = render(source, text="x", tags=[1])
    assert isinstance(answer, RowFault)
    assert answer.code is FaultCode.TEMPLATE_ERROR


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [text] * 10**9 }}",
        "{{ 'a' * n }}",
        "{{ 2**(10**9) }}",
        "{{ 9**(9**9) }}",
        "{% for i in range(n) %}{% endfor %}",
        "{{ ([range(99999)]*60000)|map('sum')|sum }}",
        "{{ (n*n*n*n*n*n*n*n*n*n*n).to_bytes(10**11, 'big') }}",
        "{{ (big ~ 'c') in [big ~ 'd'] * 10**6 }}",
        "{{ text.ljust(10**10) }}",
        "{{ [[[1]]]|tojson(indent=10**10) }}",
        "{{ '{:>{w}}'.format(text, w=10**10) }}",
        "{{ big.translate({98: big}) }}",
        "{{ range(99999)|map('string')|map('center', 99999)|list|length }}",
        "{{ (big * 60)|wordwrap(1)|length }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.last }}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ big }}{% endfor %}",
        "{% macro f(k) %}{{ f(k - 1) ~ f(k - 1) if k else '' }}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x = [s.x, s.x]|join %}{% endfor %}",
        "{% set s = namespace(x=9) %}{% for i in range(99) %}{% set s.x = s.x * s.x %}{% endfor %}{{ s.x }}",
        "{{ text|center(10**9) }}",
        "{{ text.center(10**9) }}",
        "{{ text.ljust(n) }}",
        "{{ 'a\n'|indent(10**9) }}",
        "{{ big|replace('b', big) }}",
        "{{ big.replace('b', big) }}",
        "{{ big.join(big) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (n, 1) }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=n) }}",
        "{{ [1]|batch(10**9, 1)|list }}",
    ],
)
def test_no_template_costs_more_than_a_row_may(source: str) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    answer = render(source, text="x", n=10**9, big="b" * (1 << 20))
    assert isinstance(answer, RowFault)
    assert answer.code is FaultCode.TEMPLATE_ERROR
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB


def test_what_honest_templates_do_is_untouched() -> None:
    row = {"text": "a b", "tags": ["x", "y"], "n": 1_234_567_890, "place": {"x": 1}}
    assert render("{{ '{:,}'.format(n) }} {{ '%05.1f' % 2.25 }} {{ '{:*^7}'.format('ab') }}", **row) == (
        "1,234,567,890 002.2 **ab***"
    )
    assert render("{% for t in tags %}{{ loop.index }}/{{ loop.length }}{{ t }}{{ '' if loop.last else ',' }}{% endfor %}", **row) == "1/2x,2/2y"  # fmt: skip # noqa: E501
    assert (
        render("{{ text ~ n ~ tags|join('-') }} {{ text|upper|replace('A', 'C') }}", **row)
        == "a b1234567890x-y C B"
    )
    assert render("{{ text|center(9) }}|{{ 'ab' * 3 }}|{{ n * n }}|{{ 2**10 }}|{{ tags + [1] }}", **row) == (
        f"   a b   |ababab|{1_234_567_890**2}|1024|['x', 'y', 1]"
    )
    assert render("{% for k, v in place.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", **row) == "x1"
    assert (
        render(
            "{% for t in tags if t != 'x' %}{{ t }}{% endfor %}{% for t in [] %}{% else %}no{% endfor %}",
            **row,
        )
        == "yno"
    )
    assert render("{{ tags|map('upper')|join }}{{ tags|tojson }}{{ tags|batch(1)|list }}", **row) == (
        """XY["x", "y"][['x'], ['y']]"""
    )
    assert render("{% for i in range(50000) %}x{% endfor %}", **row) == "x" * 50_000
    assert render("{% for x in [[1,[2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}") == "12"


@pytest.mark.parametrize("endless", [ENDLESS, IN_C])
def test_an_endless_row_is_its_own_error_among_others(endless: str) -> None:
    source = "{% if n == 2 %}" + endless + "{% else %}{{ n }}{% endif %}"
    rows = [("b" * (1 << 20), n) for n in range(5)]
    answers = RENDERER.rows([source], ["big", "n"], rows)
    fault = answers.pop(2)
    assert answers == [["0"], ["1"], ["3"], ["4"]]
    assert isinstance(fault, RowFault)
    assert "CPU time" in fault.message


def test_a_chat_template_has_the_same_limits() -> None:
    chats = [([{"role": "user", "content": text}], None) for text in ("x", "bomb", "y")]
    template = "{% if messages[0].content == 'bomb' %}BOMB{% else %}{{ messages[0].content }}{% endif %}"
    for bomb in (ENDLESS, "{{ 'a' * 10**10 }}"):
        first, fault, last = RENDERER.chats(template.replace("BOMB", bomb), {}, chats)
        assert (first, last) == ("x", "y")
        assert isinstance(fault, RowFault)
        assert fault.message.startswith("chat template: rendering takes more than")


@pytest.mark.parametrize(
    "prompt", [{"template": "{{ t }}" + ENDLESS}, {"column": "t", "chat_template": ENDLESS}]
)
def test_an_endless_template_fails_the_check_soon_with_one_line(prompt: dict[str, Any]) -> None:
    texts = ["x"] * 100
    chats = [[{"role": "user", "content": text}] for text in texts]
    batch = pa.RecordBatch.from_pydict({"t": texts if "template" in prompt else chats})
    builder = PromptBuilder(PromptSettings(**prompt), byte_tokenizer(), 4096, 8, batch.schema)
    started = time.process_time()
    with pytest.raises(InputError, match=r"rows have no prompt .*more than 1 s of CPU time") as caught:
        check_sample(builder, [batch])
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5


def test_threads_share_a_renderer_and_its_death_costs_no_row() -> None:
    renderer = Renderer()

    def render(n: int) -> list[list[str] | RowFault]:
        if n == 5 and renderer._process is not None:
            os.kill(renderer._process.pid, signal.SIGKILL)
        return renderer.rows(["{{ n }}"], ["n"], [(n,), (n + 1,)])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(20))) == [[[str(n)], [str(n + 1)]] for n in range(20)]


def test_a_template_is_not_to_blame_for_a_renderer_that_was_killed():
    renderer = Renderer()
    assert renderer.compile_errors(["{{ text }}"]) == [None]
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.compile_errors(["{{ text }}", "{{ text"])[0] is None


def test_a_row_is_blamed_for_a_killed_renderer_only_after_three_kills(monkeypatch):
    renderer = Renderer()
    ask, kills = renderer._ask, [3]

    def kill_before(*arguments: Any) -> Any:
        if kills[0]:
            kills[0] -= 1
            if renderer._connection is None:
                renderer._start()
            assert renderer._process is not None
            renderer._process.kill()
            renderer._process.wait()
        return ask(*arguments)

    assert renderer.rows(["{{ text }}"], ["text"], [("a",)]) == [["a"]]
    monkeypatch.setattr(renderer, "_ask", kill_before)
    assert renderer.rows(["{{ text }}"], ["text"], [("a",), ("b",)]) == [["a"], ["b"]]
    kills[0] = 4
    first, second = renderer.rows(["{{ text }}"], ["text"], [("a",), ("b",)])
    assert isinstance(first, RowFault)
    assert second == ["b"]


@pytest.mark.parametrize("spared", [0, 1])
def test_a_renderer_that_is_always_killed_while_a_job_is_prepared_is_no_templates_fault(monkeypatch, spared):
    answers = iter(range(spared))
    ask = RENDERER._ask
    # With one answer spared, the template compiles and only its rows' renderer is killed.
    monkeypatch.setattr(RENDERER, "_ask", lambda *what: KILLED if next(answers, None) is None else ask(*what))
    batch = pa.RecordBatch.from_pydict({"t": ["x"] * 8})

    def prepare() -> None:
        settings = PromptSettings(template="{{ t|trim }}")
        check_sample(PromptBuilder(settings, byte_tokenizer(), 4096, 8, batch.schema), [batch])

    with pytest.raises(BatchrunError, match=r"renders templates was killed 3 times.*memory") as caught:
        prepare()
    assert caught.value.exit_code is ExitCode.FAILED
    assert "fix the template" not in str(caught.value)


def test_a_renderer_whose_parent_was_killed_ends_without_a_word():
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrun.prompt.render_server", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    connection = Connection(ours.detach())
    connection.send(("compile", (["{{ text }}"],)))
    assert connection.poll(60)
    # An answer that nobody reads resets the connection.
    connection.close()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (0, "")


def test_a_stop_that_hits_a_renderer_while_it_starts_prints_no_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C goes to every process of a terminal."""
    renderer = Renderer()
    renderer._start()
    assert renderer._process is not None
    for _ in range(20):
        os.kill(renderer._process.pid, signal.SIGINT)
        time.sleep(0.01)
    assert renderer.rows(["{{ a }}"], ["a"], [("text",)]) == [["text"]]
    renderer._process.kill()
    assert "Traceback" not in capfd.readouterr().err
