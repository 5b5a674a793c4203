"""The bytes of tokens are those that the tokenizer itself decodes, whatever kind it is."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tiny import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batchrun.errors import ModelError
from batchrun.structured.answer_format import answer_format
from batchrun.structured.tokens import ENDED, token_automaton
from batchrun.structured.vocabulary import read_vocabulary

WORDS = ["▁", "▁the", "th", "e", "▁{", '"', "a", ":", "▁日本", "é", "}", "▁▁", "1", "2"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's alphabet, with tokens of several bytes, of half a character, and added ones."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.add_tokens(["<tool_call>", "  ", AddedToken("日本", normalized=False), "\n\n"])
    return tokenizer


def llama() -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback; a first space is not part of the text."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *WORDS])}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def gemma() -> PreTrainedTokenizerFast:
    """The same without a space that is lost."""
    tokenizer = llama()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece unigram without byte fallback, as T5 has it."""
    backend = Tokenizer(models.Unigram([(token, -1.0) for token in [*SPECIAL, *WORDS]], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


KINDS = {"byte level": byte_level, "llama": llama, "gemma": gemma, "unigram": unigram}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_what_the_tokenizer_decodes(kind: str) -> None:
    tokenizer = KINDS[kind]()
    vocabulary = read_vocabulary(tokenizer, "model")
    usable = [i for i, token in enumerate(vocabulary.tokens) if token is not None]
    r = random.Random(0)
    compared = 0
    for _ in range(3000):
        ids = r.choices(usable, k=r.randrange(1, 8))
        try:
            text = vocabulary.text(ids).decode()
        except UnicodeDecodeError:
            continue  # no answer: an automaton allows whole characters only
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        compared += 1
    assert compared > 300


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_in_no_answer(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = read_vocabulary(tokenizer, "model").tokens
    assert all(tokens[i] is None for i in tokenizer.all_special_ids)


def tables(tokenizer: Any, **wanted: Any) -> Any:
    made = answer_format(**wanted)
    assert made is not None
    end = tokenizer.convert_tokens_to_ids("</s>")
    return token_automaton(made.automaton, read_vocabulary(tokenizer, "model"), [end], "model")


@pytest.mark.parametrize("kind", ["byte level", "llama", "gemma"])
@pytest.mark.parametrize("text", ["the {é日🎉}", "日本", " a"])
def test_a_text_is_an_answer_in_the_tokenizers_own_tokens(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    automaton = tables(tokenizer, choices=[text])
    # A llama's tokens of a text have a space before it, which is no part of what they decode to.
    written = f" {text}" if kind == "llama" else text
    ids = tokenizer.encode(
        written.replace(" ", "▁") if kind != "byte level" else written, add_special_tokens=False
    )
    state = automaton.start
    for token in [*ids, tokenizer.convert_tokens_to_ids("</s>")]:
        state = automaton.next_state[state, automaton.token_class[token]]
        assert state
    assert state == ENDED


def test_a_first_space_is_lost_once() -> None:
    tokenizer = llama()
    automaton = tables(tokenizer, choices=["a"])
    space, letter = tokenizer.convert_tokens_to_ids(["▁", "a"])

    def after(*ids: int) -> int:
        state = automaton.start
        for token in ids:
            state = int(automaton.next_state[state, automaton.token_class[token]])
        return state

    assert after(letter) == after(space, letter) > ENDED
    assert after(space, space) == 0


def test_an_answer_that_the_vocabulary_cannot_write_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot write any answer"):
        tables(unigram(), choices=["xyz"])


def test_tokens_behind_which_no_answer_can_end_are_not_allowed() -> None:
    tokenizer = unigram()
    automaton = tables(tokenizer, choices=["the", "thx"])
    th, e = tokenizer.convert_tokens_to_ids(["th", "e"])
    allowed = automaton.next_state[automaton.start][automaton.token_class].nonzero()[0].tolist()
    assert allowed == sorted(tokenizer.convert_tokens_to_ids(["▁", "▁the", "th", "▁▁"]))
    state = automaton.next_state[automaton.start, automaton.token_class[th]]
    assert automaton.next_state[state][automaton.token_class].nonzero()[0].tolist() == [e]
    with pytest.raises(ModelError, match="cannot write any answer"):
        tables(tokenizer, choices=["thx"])


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), "model")
