"""A row becomes token ids that fit the model, or its own fault; never another row's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, NO_SYSTEM, byte_tokenizer
from transformers import ByT5Tokenizer

from batchrun.errors import FaultCode, InputError, JobError, ModelError, RowFault
from batchrun.job.prompt import Message, PromptSettings
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.tokens import PromptBuilder, check_sample

ROLE_CONTENT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def builder_of(
    batch: pa.RecordBatch, context: int = 4096, new: int = 8, tokenizer: Any = None, **prompt: Any
) -> PromptBuilder:
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    return PromptBuilder(PromptSettings(**prompt), tokenizer, context, new, batch.schema)


def build(batch: pa.RecordBatch, **how: Any) -> list[Any]:
    return builder_of(batch, **how).build(batch)


def text_of(ids: Any, tokenizer: Any = None) -> str:
    return (tokenizer or byte_tokenizer()).decode(ids)


def codes(rows: list[Any]) -> list[str | None]:
    return [row.code.value if isinstance(row, RowFault) else None for row in rows]


def chats(*rows: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(rows, ROLE_CONTENT)], ["chat"])


def invalid_utf8(*values: bytes | None) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


# what a prompt is made of


def test_a_template_is_sent_as_it_is_with_the_tokenizers_special_tokens() -> None:
    batch = batch_of(a=["x", "y"], n=[1, None], unused=[1, 2])
    builder = builder_of(batch, template="<{{ a }}>{% if n is not none %} {{ n + 1 }}{% endif %}\n")
    assert builder.columns == ["a", "n"]
    assert builder.render(batch) == ["<x> 2\n", "<y>\n"]
    assert [text_of(row) for row in builder.build(batch)] == ["<s><x> 2\n", "<s><y>\n"]
    assert all(row.dtype == np.int32 for row in builder.build(batch))


def test_messages_go_through_the_chat_template_once() -> None:
    batch = batch_of(q=["Why?"])
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Q: {{ q }}")]
    (row,) = build(batch, messages=messages)
    assert text_of(row) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nQ: Why?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_list_of_structs_is_a_conversation() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    batch = chats(talk, None, [], [{"role": "user", "content": None}], talk[:1]).slice(0)
    rows = build(batch, column="chat")
    assert codes(rows) == [None, "NULL_PROMPT", "EMPTY_PROMPT", "NULL_PROMPT", None]
    tokenizer = byte_tokenizer()
    assert rows[0].tolist() == tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert text_of(build(batch.slice(4), column="chat")[0]).startswith("<|im_start|>user\na<|im_end|>")


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda t: pa.list_(t, 1)])
def test_every_kind_of_list_is_a_conversation(kind: Any) -> None:
    fields = [("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())]
    array = pa.array([[{"role": "user", "content": "hi", "name": None}]] * 2, kind(pa.struct(fields)))
    rows = build(pa.RecordBatch.from_arrays([array], ["chat"]), column="chat")
    assert [text_of(row) for row in rows] == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_a_text_column_is_sent_as_it_is() -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        array = pa.array(["x", None, "x y"], pa.string()).cast(kind)
        rows = build(pa.RecordBatch.from_arrays([array], ["t"]), column="t")
        assert [text_of(row) for row in (rows[0], rows[2])] == ["<s>x", "<s>x y"]
        assert codes(rows) == [None, "NULL_PROMPT", None]


ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
conversations = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=20)}),
    min_size=1,
    max_size=4,
)


def asks(row: list[Any]) -> bool:
    """Whether the model's answer is a message of its own."""
    return row[-1]["role"] != "assistant"


def as_transformers(tokenizer: Any, row: list[Any]) -> list[int]:
    how = {"add_generation_prompt": True} if asks(row) else {"continue_final_message": True}
    return tokenizer.apply_chat_template(row, return_dict=False, **how)


@settings(max_examples=150)
@given(
    st.lists(conversations, min_size=1, max_size=5),
    st.sampled_from([CHATML, NO_SYSTEM, "{{ bos_token }}" + CHATML]),
)
def test_conversations_become_what_apply_chat_template_gives(rows: list[Any], template: str) -> None:
    tokenizer = byte_tokenizer(template, bos_token="<s>")
    batch = chats(*rows)
    for row, built in zip(rows, build(batch, column="chat", tokenizer=tokenizer, empty="send"), strict=True):
        if template == NO_SYSTEM and row[0]["role"] == "system":
            assert built.code == FaultCode.TEMPLATE_ERROR
        else:
            assert built.tolist() == as_transformers(tokenizer, row)


@settings(max_examples=100)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_texts_become_what_the_tokenizer_gives(rows: list[str]) -> None:
    tokenizer = byte_tokenizer()
    for row, built in zip(
        rows, build(batch_of(t=rows), column="t", tokenizer=tokenizer, empty="send"), strict=True
    ):
        assert built.tolist() == tokenizer(row).input_ids


# rows that are at fault themselves


def test_null_empty_and_good_rows_stay_apart() -> None:
    batch = batch_of(t=["x", None, "", "y"])
    for prompt in (
        {"column": "t"},
        {"template": "{{ t }}"},
        {"messages": [{"role": "user", "content": "{{ t }}"}]},
    ):
        assert codes(build(batch, **prompt)) == [None, "NULL_PROMPT", "EMPTY_PROMPT", None]
        sent = build(batch, empty="send", **prompt)
        assert codes(sent) == [None, "NULL_PROMPT", None, None]


def test_a_null_never_becomes_the_word_none() -> None:
    batch = batch_of(t=[None, "x"])
    for template in ("{{ t }}", "{{ t | trim }}", "{{ t ~ '!' }}", "{{ [t] | join }}", "{{ t | upper }}"):
        assert codes(build(batch, template="a" + template)) == ["NULL_PROMPT", None], template
    for template, expected in (
        ("{{ t or 'nothing' }}", "nothing"),
        ("{% if t is none %}nothing{% endif %}", "nothing"),
        ("{% if t == none %}nothing{% endif %}", "nothing"),
        ("{{ 'a' if t else 'nothing' }}", "nothing"),
        ("{{ t | default('nothing', true) }}", "nothing"),
        ("{{ {'t': t} | tojson }}", '{"t": null}'),
    ):
        assert builder_of(batch, template=template).render(batch)[0] == expected


def test_an_empty_prompt_that_is_sent_has_a_token_or_is_a_fault() -> None:
    batch = batch_of(t=[""])
    with_bos = byte_tokenizer(bos=False, bos_token="<s>")
    assert build(batch, column="t", empty="send", tokenizer=with_bos)[0].tolist() == [0]
    assert codes(build(batch, column="t", empty="send", tokenizer=byte_tokenizer(bos=False))) == [
        "EMPTY_PROMPT"
    ]


def test_invalid_utf8_is_the_fault_of_its_row_alone() -> None:
    array = invalid_utf8(b"good", b"b\xffd", None, b"\xc3\xa4")
    batch = pa.RecordBatch.from_arrays([array], ["t"])
    for prompt in (
        {"column": "t"},
        {"template": "{{ t }}"},
        {"messages": [{"role": "user", "content": "{{ t }}"}]},
    ):
        rows = build(batch, **prompt)
        assert codes(rows) == [None, "INVALID_UTF8", "NULL_PROMPT", None]
        assert "ä" in text_of(rows[3])


def test_invalid_utf8_in_one_message_is_the_fault_of_its_row_alone() -> None:
    items = pa.StructArray.from_arrays(
        [pa.array(["user"] * 3), invalid_utf8(b"a", b"\xff", b"c")], ["role", "content"]
    )
    batch = pa.RecordBatch.from_arrays(
        [pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), items)], ["chat"]
    )
    assert codes(build(batch, column="chat")) == [None, "INVALID_UTF8", None]


def test_half_a_surrogate_pair_is_the_fault_of_its_row_alone() -> None:
    batch = batch_of(t=["a", "b"])
    template = "{{ t }}{% if t == 'a' %}{{ '\\ud83d' }}{% endif %}"
    assert codes(build(batch, template=template)) == ["INVALID_UTF8", None]


def test_a_template_error_is_the_fault_of_its_row_alone() -> None:
    batch = batch_of(m=[{"a": [1]}, {"a": []}, None], n=[1, 0, 2])
    rows = build(batch, template="{{ m.a[0] }} {{ 1 // n }}")
    assert codes(rows) == [None, "TEMPLATE_ERROR", "TEMPLATE_ERROR"]
    assert "undefined" in rows[1].message.lower() or "no element" in rows[1].message
    assert codes(build(batch, template="{{ m.missing }}"))[0] == "TEMPLATE_ERROR"


def test_roles_that_a_chat_template_refuses_are_the_fault_of_their_row_alone() -> None:
    batch = chats([{"role": "system", "content": "s"}], [{"role": "user", "content": "u"}])
    rows = build(batch, column="chat", tokenizer=byte_tokenizer(NO_SYSTEM))
    assert codes(rows) == ["TEMPLATE_ERROR", None]
    assert "System role not supported" in rows[0].message


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    batch = batch_of(t=["x"])
    for template in (
        "{{ t.__class__.__mro__ }}",
        "{{ t.format.__globals__ }}",
        "{% for i in range(10**9) %}.{% endfor %}",
    ):
        assert codes(build(batch, template=template + "{{ t }}")) == ["TEMPLATE_ERROR"]


# limits


def test_prompt_and_new_tokens_reach_the_context_exactly() -> None:
    batch = batch_of(t=["x" * 10, "x" * 11, "x" * 12])
    rows = build(batch, column="t", context=20, new=8)  # <s> and 11 bytes fill the 12 that are left
    assert codes(rows) == [None, None, "PROMPT_TOO_LONG"]
    assert len(rows[1]) + 8 == 20
    assert rows[2].message == "13 tokens, and 12 fit (context 20, 8 new tokens)"


def test_a_text_is_cut_on_the_declared_side_to_the_token() -> None:
    batch = batch_of(t=["0123456789abcdef"])
    (left,) = build(batch, column="t", context=20, new=10, truncate="left")
    (right,) = build(batch, column="t", context=20, new=10, truncate="right")
    assert (text_of(left), text_of(right)) == ("<s>789abcdef", "<s>012345678")
    assert len(left) + 10 == len(right) + 10 == 20


def test_a_conversation_is_cut_in_its_longest_user_message_and_keeps_its_frame() -> None:
    talk = [
        {"role": "system", "content": "s" * 40},
        {"role": "user", "content": "short"},
        {"role": "user", "content": "0123456789" * 10},
    ]
    (whole,) = build(chats(talk), column="chat")
    for side, kept in (("left", ("0123456789" * 10)[-50:]), ("right", ("0123456789" * 10)[:50])):
        (cut,) = build(chats(talk), column="chat", context=len(whole) - 50 + 8, new=8, truncate=side)
        talk_kept = [*talk[:2], {"role": "user", "content": kept}]
        expected = byte_tokenizer().apply_chat_template(
            talk_kept, add_generation_prompt=True, return_dict=False
        )
        assert cut.tolist() == expected
        assert len(cut) == len(whole) - 50


def test_a_conversation_whose_frame_alone_is_too_long_is_a_fault() -> None:
    talk = [{"role": "system", "content": "s" * 100}, {"role": "user", "content": "u" * 100}]
    assert codes(build(chats(talk), column="chat", context=80, truncate="left")) == ["PROMPT_TOO_LONG"]


@settings(max_examples=80)
@given(
    st.lists(conversations.filter(asks), min_size=1, max_size=3),
    st.integers(10, 90),
    st.sampled_from(["left", "right"]),
)
def test_whatever_is_cut_fits_and_ends_as_the_template_ends(rows: list[Any], context: int, side: str) -> None:
    for built in build(chats(*rows), column="chat", context=context, new=4, truncate=side, empty="send"):
        if isinstance(built, RowFault):
            assert built.code == FaultCode.PROMPT_TOO_LONG
        else:
            assert 0 < len(built) <= context - 4
            assert text_of(built).endswith("<|im_start|>assistant\n")


def test_a_prompt_beyond_the_byte_cap_is_never_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(t=["ä" * 500_000, "short"])
    builder = builder_of(batch, column="t", max_bytes=10_000)
    lengths: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts, special: lengths.extend(map(len, texts)) or encode(self, texts, special),
    )
    rows = builder.build(batch)
    assert codes(rows) == ["PROMPT_TOO_LONG", None]
    assert rows[0].message == "1000000 bytes, and prompt.max_bytes is 10000"
    assert lengths == [5]
    cut = builder_of(batch, column="t", max_bytes=10_000, truncate="right", context=101, new=1)
    lengths.clear()
    assert [len(row) for row in cut.build(batch)] == [100, 6]
    assert lengths == [5000, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_byte_cap_cuts_on_the_declared_side_and_keeps_the_frame(side: str) -> None:
    content = "a" * 5000 + "b" * 5000
    talk = [{"role": "user", "content": content}]
    (row,) = build(chats(talk), column="chat", max_bytes=1000, truncate=side)
    text = text_of(row)
    assert len(text) == 1000
    assert ("b" if side == "left" else "a") * 900 in text
    assert text.startswith("<|im_start|>user\n")


def test_many_long_prompts_are_not_tokenized_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(byte_tokenizer())
    monkeypatch.setattr("batchrun.prompt.encoder._CHUNK_CHARS", 100)
    texts = ["x" * n for n in (40, 40, 40, 250, 1, 0, 99, 2)]
    assert [len(ids) for ids in encoder.encode(texts, False)] == [len(text) for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_character_of_many_tokens_is_cut_whole(side: str) -> None:
    encoder = Encoder(byte_tokenizer())
    for text in ("👍👍", "a👍", "👍a", "x"):
        for count in range(1, len(text.encode()) + 2):
            kept = encoder.drop(text, count, side)
            assert len(kept) < len(text)
            assert kept in text
            assert len(kept.encode()) <= max(0, len(text.encode()) - count)


def test_a_tokenizer_in_plain_python_gives_the_same() -> None:
    slow = ByT5Tokenizer(chat_template=CHATML)
    assert not slow.is_fast
    batch = batch_of(t=["hello", None, "x" * 50])
    rows = build(batch, column="t", tokenizer=slow, context=30, new=10, truncate="left")
    assert [text_of(rows[0], slow), text_of(rows[2], slow)] == ["hello</s>", "x" * 19 + "</s>"]
    assert codes(rows) == [None, "NULL_PROMPT", None]
    talk = [{"role": "user", "content": "0123456789"}]
    (whole,) = build(chats(talk), column="chat", tokenizer=slow)
    assert whole.tolist() == slow.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    (cut,) = build(
        chats(talk), column="chat", tokenizer=slow, context=len(whole) + 4, new=8, truncate="right"
    )
    assert text_of(cut, slow) == text_of(whole, slow).replace("0123456789", "012345")
    assert Detokenizer(slow, ["lo"], [1]).decode(rows[:1]) == ["hel"]


# faults of the whole job, found at the start


def test_a_tokenizer_without_a_chat_template_works_unless_messages_need_it() -> None:
    batch = batch_of(t=["x"])
    bare = byte_tokenizer(chat_template=None)
    messages = [Message(role="user", content="{{ t }}")]
    assert codes(build(batch, template="{{ t }}", tokenizer=bare)) == [None]
    with pytest.raises(ModelError, match=r"no chat template.*set prompt.chat_template"):
        builder_of(batch, messages=messages, tokenizer=bare)
    (row,) = build(batch, messages=messages, tokenizer=bare, chat_template="[{{ messages[0].content }}]")
    assert text_of(row) == "[x]"


def test_a_tokenizer_that_was_saved_with_truncation_does_not_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert [len(row) for row in build(batch_of(t=["x" * 20, "y"]), column="t", tokenizer=tokenizer)] == [
        21,
        2,
    ]


def test_unknown_columns_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'txt', did you mean 'text'\?"):
        builder_of(batch_of(text=["x"]), template="{{ txt }}")


def test_a_syntax_error_is_told_with_its_line() -> None:
    with pytest.raises(JobError, match=r"prompt\.template: line 2: unexpected"):
        builder_of(batch_of(t=["x"]), template="a\n{{ t ")
    messages = [Message(role="system", content=""), Message(role="user", content="{{ t | nofilter }}")]
    with pytest.raises(JobError, match=r"messages\[1\]\.content: line 1: .*nofilter"):
        builder_of(batch_of(t=["x"]), messages=messages)


def test_a_column_of_another_type_is_refused_with_its_type() -> None:
    with pytest.raises(InputError, match=r"column 'n' is int64, neither text nor"):
        builder_of(batch_of(n=[1]), column="n")
    with pytest.raises(InputError, match=r"column 'n' is list<item: string>"):
        builder_of(batch_of(n=[["a"]]), column="n")


def test_no_room_for_any_prompt_is_refused() -> None:
    with pytest.raises(JobError, match="64 new tokens leave no room for a prompt in the model's 64"):
        builder_of(batch_of(t=["x"]), column="t", context=64, new=64)


def test_a_template_that_fails_for_most_of_the_first_rows_is_refused_with_examples() -> None:
    batch = batch_of(t=["x"] * 40 + [None] * 60 + ["x"] * 1000)
    builder = builder_of(batch, column="t")
    with pytest.raises(
        InputError, match=r"60 of the first 100 rows have no prompt \(row 40: NULL_PROMPT.*row 42"
    ):
        check_sample(builder, [batch.slice(0, 70), batch.slice(70)])
    check_sample(builder, [batch.slice(0, 80)])
    check_sample(builder, [batch.slice(100)])
    check_sample(builder, [])


def test_prompts_that_are_too_long_are_told_how_to_be_shorter() -> None:
    batch = batch_of(t=["x" * 99] * 3 + ["x"])
    with pytest.raises(InputError, match=r"3 of the first 4 .*set prompt\.truncate: right"):
        check_sample(builder_of(batch, column="t", context=64, new=8), [batch])
