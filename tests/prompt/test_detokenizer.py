"""Token ids to answers: no stop token, no special token, nothing from the first stop text on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from batchrun.prompt.detokenizer import Detokenizer

TOKENIZER = byte_tokenizer()


def ids_of(*texts: str) -> list[np.ndarray]:
    return [np.array(TOKENIZER(text, add_special_tokens=False).input_ids, dtype=np.int32) for text in texts]


def test_the_ending_stop_token_and_special_tokens_are_no_part_of_an_answer() -> None:
    (bang,) = ids_of("!")[0].tolist()
    answers = ids_of("hi</s>", "hi!", "hi!!", "<s>a<|im_end|>b", "")
    assert Detokenizer(TOKENIZER, [], [1, bang]).decode(answers) == ["hi", "hi", "hi!", "ab", ""]


def test_an_answer_ends_before_the_first_stop_text() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["END", "\n\n"], [1])
    assert detokenizer.decode(ids_of("a\n\nb END", "a END \n\n", "a\nb", "END")) == ["a", "a ", "a\nb", ""]


def test_spaces_stay_as_they_were_generated() -> None:
    tokenizer = byte_tokenizer(clean_up_tokenization_spaces=True)
    assert Detokenizer(tokenizer, [], []).decode(ids_of("a . b , c n't")) == ["a . b , c n't"]


@settings(max_examples=100)
@given(st.lists(st.text(max_size=20), max_size=6))
def test_texts_survive_the_way_to_tokens_and_back(texts: list[str]) -> None:
    assert Detokenizer(TOKENIZER, [], [1]).decode(ids_of(*texts)) == texts
