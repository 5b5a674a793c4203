"""What a model thinks before it answers is told apart from its answer, wherever the answer was cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from chat_templates import CHANNELS, DEEPSEEK_R1, GPT_OSS, QWEN3, QWEN3_THINKING, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, byte_tokenizer
from transformers import ByT5Tokenizer

from batchrun.errors import ModelError
from batchrun.job.prompt import PromptSettings
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.prompt.reasoning import Parts, Reasoning, find_reasoning
from batchrun.prompt.tokens import Prompt, PromptBuilder

END = 1  # </s>
USER = [{"role": "user", "content": "{{ text }}"}]


def reasoning_of(tokenizer: Any, markers: list[str] | None = None, stop: tuple[str, ...] = ()) -> Reasoning:
    return find_reasoning(markers, tokenizer, Detokenizer(tokenizer, stop, [END]))


def prompts(tokenizer: Any, columns: dict[str, Any], **prompt: Any) -> list[Prompt]:
    batch = pa.RecordBatch.from_pydict(columns)
    settings = PromptSettings(**prompt)
    return PromptBuilder(settings, tokenizer, 4096, 8, batch.schema, reasoning_of(tokenizer)).prompts(batch)


def taken_apart(tokenizer: Any, text: str, is_begun: bool = False, **how: Any) -> Parts:
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return reasoning_of(tokenizer, **how).take_apart(ids, is_begun)


def test_thoughts_that_the_model_opens_are_taken_out_of_the_answer() -> None:
    tokenizer = tokenizer_of(QWEN3)
    for text, wanted in (
        ("<think>\nTwo and two.\n</think>\n\n4</s>", Parts("Two and two.", "4", 16)),
        ("\n<think>a</think>4 is it </s>", Parts("a", "4 is it ", 4)),
        ("<think>\n\n</think>\n\n4</s>", Parts("", "4", 4)),
        ("<think></think></s>", Parts("", "", 2)),
        ("4</s>", Parts(None, "4", 0)),
        ("</s>", Parts(None, "", 0)),
        ("", Parts(None, "", 0)),
        ("Write <think> and </think>.</s>", Parts(None, "Write <think> and </think>.", 0)),
        ("<think>a</think>b</think>c</s>", Parts("a", "b</think>c", 3)),
    ):
        assert taken_apart(tokenizer, text) == wanted, text


def test_an_answer_that_is_cut_while_the_model_thinks_is_null() -> None:
    tokenizer = tokenizer_of(QWEN3)
    assert taken_apart(tokenizer, "<think>\nTwo and") == Parts("Two and", None, 9)
    assert taken_apart(tokenizer, "<think>") == Parts("", None, 1)
    assert taken_apart(tokenizer, "<think>\nTwo</think>") == Parts("Two", "", 6)
    assert taken_apart(tokenizer, "Two and", is_begun=True) == Parts("Two and", None, 7)
    assert taken_apart(tokenizer, "", is_begun=True) == Parts("", None, 0)


@pytest.mark.parametrize("template", [QWEN3_THINKING, DEEPSEEK_R1])
def test_a_template_may_open_the_thoughts_in_the_prompt(template: str) -> None:
    tokenizer = tokenizer_of(template)
    (prompt,) = prompts(tokenizer, {"text": ["2+2?"]}, messages=USER)
    assert prompt.is_reasoning
    assert taken_apart(tokenizer, "Two.\n</think>\n\n4</s>", True) == Parts("Two.", "4", 6)
    # Some open it once more.
    assert taken_apart(tokenizer, "<think>Two.</think>4</s>", True) == Parts("Two.", "4", 6)


def test_thoughts_that_the_template_closes_or_leaves_to_the_model_are_not_begun() -> None:
    tokenizer = tokenizer_of(QWEN3)
    for kwargs in ({}, {"enable_thinking": False}):
        (prompt,) = prompts(tokenizer, {"text": ["2+2?"]}, messages=USER, template_kwargs=kwargs)
        assert not prompt.is_reasoning


def test_markers_in_a_row_open_nothing() -> None:
    tokenizer = tokenizer_of(QWEN3)
    for prompt in prompts(
        tokenizer, {"text": ["<think>", "say <think>\n", "</think><think>"]}, messages=USER
    ):
        assert not prompt.is_reasoning
    for prompt in prompts(tokenizer_of(QWEN3_THINKING), {"text": ["</think>"]}, messages=USER):
        assert prompt.is_reasoning


def test_a_begun_message_may_have_begun_to_think() -> None:
    tokenizer = tokenizer_of(CHATML)
    start = [*USER, {"role": "assistant", "content": "{{ start }}"}]
    starts = ["<think>\nLet me", "<think>a</think>\n\nIt is", "It is", "<think>"]
    rows = prompts(tokenizer, {"text": ["x"] * 4, "start": starts}, messages=start)
    assert [row.is_reasoning for row in rows] == [True, False, False, True]


def test_gpt_oss_thinks_in_another_channel() -> None:
    tokenizer = tokenizer_of(GPT_OSS, plain=(), special=CHANNELS)
    (prompt,) = prompts(tokenizer, {"text": ["2+2?"]}, messages=USER)
    assert not prompt.is_reasoning
    header = "<|channel|>analysis<|message|>"
    whole = f"{header}Two.<|end|><|start|>assistant<|channel|>final<|message|>4</s>"
    parts = taken_apart(tokenizer, whole)
    assert (parts.reasoning, parts.answer) == ("Two.", "4")
    assert parts.tokens == len(tokenizer.encode(whole, add_special_tokens=False)) - 2
    assert taken_apart(tokenizer, f"{header}Two.<|end|><|start|>assistant").answer is None


def test_markers_of_ordinary_text_are_found_whatever_tokens_they_became() -> None:
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    assert "<plan>" not in tokenizer.get_vocab()
    markers = ["<plan>", "</plan>"]
    assert not reasoning_of(tokenizer, markers).closing.exact
    assert taken_apart(tokenizer, "<plan>ä b</plan>\n4</s>", markers=markers) == Parts("ä b", "4", 17)
    assert taken_apart(tokenizer, "<plan>ä b</pla", markers=markers) == Parts("ä b</pla", None, 15)
    slow = ByT5Tokenizer(chat_template=CHATML)
    assert taken_apart(slow, "<plan>ä b</plan>\n4", markers=markers) == Parts("ä b", "4", 17)
    assert backend is tokenizer.backend_tokenizer


def test_a_token_may_hold_the_end_of_a_marker_and_what_comes_after_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([">\n\n4"])
    parts = taken_apart(tokenizer, "<plan>a</plan>\n\n42</s>", markers=["<plan>", "</plan>"])
    assert parts == Parts("a", "42", 14)


def test_the_tokens_of_the_closing_marker_are_known() -> None:
    tokenizer = tokenizer_of(QWEN3)
    closing = reasoning_of(tokenizer).closing
    assert closing.token_ids == (tokenizer.convert_tokens_to_ids("</think>"),)
    assert closing.exact


def test_a_stop_text_ends_thoughts_and_answers_alike() -> None:
    tokenizer = tokenizer_of(QWEN3)
    assert taken_apart(tokenizer, "<think>a</think>b END", stop=("END",)) == Parts("a", "b ", 3)
    assert taken_apart(tokenizer, "<think>a END", stop=("END",)) == Parts("a", None, 6)


def test_markers_come_from_the_tokenizer_or_its_template_or_the_job() -> None:
    assert reasoning_of(tokenizer_of(CHATML)).opening.text == "<think>"
    in_template = byte_tokenizer(CHATML + "{# <think> </think> #}")
    assert reasoning_of(in_template).closing.text == "</think>"
    magistral = tokenizer_of(CHATML, plain=(), special=("[THINK]", "[/THINK]"))
    assert reasoning_of(magistral).opening.text == "[THINK]"
    assert taken_apart(magistral, "[THINK]a[/THINK]b</s>") == Parts("a", "b", 3)
    with pytest.raises(ModelError, match=r"has markers of reasoning.*set answer.reasoning_markers") as caught:
        reasoning_of(byte_tokenizer())
    assert caught.value.where == "answer.reasoning"


texts = st.text(st.characters(codec="utf-8", exclude_characters="<>[]|"), max_size=20)


@settings(max_examples=100)
@given(texts, texts, st.booleans(), st.data())
def test_every_cut_of_an_answer_is_taken_apart_as_the_whole_one(
    thought: str, answer: str, is_begun: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(QWEN3)
    reasoning = reasoning_of(tokenizer)
    head = ("" if is_begun else "<think>") + thought + "</think>"
    ids = np.array(tokenizer.encode(head + answer, add_special_tokens=False), np.int32)
    ending = len(tokenizer.encode(head, add_special_tokens=False))
    whole = reasoning.take_apart(ids, is_begun)
    assert whole == Parts(thought.strip(), answer.lstrip(), ending)
    cut = data.draw(st.integers(0 if is_begun else 1, len(ids)))
    parts = reasoning.take_apart(ids[:cut], is_begun)
    if cut < ending:
        assert (parts.answer, parts.tokens) == (None, cut)
    else:
        assert (parts.reasoning, parts.tokens) == (whole.reasoning, ending)
        assert parts.answer is not None
