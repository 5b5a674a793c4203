"""The quickstart: its dataset is what the generator writes, and its model reads orders it has never seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from batchrun.job.job import Job

FOLDER = Path(__file__).parents[2] / "jobs" / "quickstart"
sys.path.insert(0, str(FOLDER))

import orders  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def unseen() -> list[orders.Row]:
    return list(orders.rows(orders.TEST_SEED, orders.TEST_ROWS))


def test_a_seed_gives_the_same_rows_every_time() -> None:
    once, again = list(orders.rows(5, 50)), list(orders.rows(5, 50))
    assert once == again
    assert list(orders.rows(5, 20)) == once[:20]
    assert {row.text for row in once}.isdisjoint(row.text for row in orders.rows(6, 50))


def test_the_dataset_is_what_the_generator_writes() -> None:
    table = pq.read_table(FOLDER / "orders.parquet")
    fresh = orders.to_table(list(orders.rows(orders.DATASET_SEED, orders.DATASET_ROWS)))
    assert table.to_pylist() == fresh.to_pylist()
    assert table.schema.field("received").type == pa.timestamp("ms", tz="UTC")
    assert pq.ParquetFile(FOLDER / "orders.parquet").num_row_groups == 8


def test_orders_are_20_to_400_tokens_with_a_long_tail(tokenizer: Any) -> None:
    texts = [row.text for row in orders.rows("lengths", 3000)]
    lengths = sorted(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert lengths[0] >= 20
    assert lengths[-1] <= 400
    assert 50 <= lengths[1500] <= 60
    assert lengths[2970] > 3 * lengths[1500]


def test_every_truth_is_an_order_that_the_job_has_tokens_for(tokenizer: Any) -> None:
    room = Job.load(FOLDER / "job.yaml").generation.max_new_tokens
    for row in orders.rows("truths", 1000):
        order = json.loads(row.expected)
        assert tuple(order) == orders.FIELDS
        assert orders.Order(**order).to_json() == row.expected
        tokens = tokenizer(row.expected, add_special_tokens=False)["input_ids"]
        assert len(tokens) < room
        assert tokenizer.decode(tokens) == row.expected


def test_a_row_is_right_only_if_every_field_is() -> None:
    truth = next(orders.rows(5, 1)).expected
    order = json.loads(truth)
    wrong = json.dumps(order | {"quantity": order["quantity"] + 1})
    assert orders.right_fields(wrong, truth) == set(orders.FIELDS) - {"quantity"}
    assert orders.score([truth, wrong, "{", None], [truth] * 4) == 0.25
    assert orders.score([json.dumps(order | {"more": 1})], [truth]) == 0
    assert orders.score([json.dumps(order | {"quantity": str(order["quantity"])})], [truth]) == 0


def test_the_job_sends_the_prompt_that_the_model_learned() -> None:
    (message,) = Job.load(FOLDER / "job.yaml").prompt.messages or []
    assert message.role == "user"
    assert jinja2.Template(message.content).render(text="5 mugs,\n3 €") == orders.prompt("5 mugs,\n3 €")


def test_the_chat_template_takes_three_roles_and_no_other(tokenizer: Any) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"
    with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_folder_is_under_8_mb_and_free_of_pickles() -> None:
    shipped = [
        path
        for path in FOLDER.rglob("*")
        if path.is_file() and not {"answers", "__pycache__"} & set(path.parts)
    ]
    assert sum(path.stat().st_size for path in shipped) < 8_000_000
    assert {path.suffix for path in shipped} <= {
        ".py",
        ".yaml",
        ".parquet",
        ".json",
        ".jinja",
        ".safetensors",
    }


def test_orders_packed_into_a_block_do_not_see_each_other(tokenizer: Any, model: Any) -> None:
    rows = list(orders.rows("packing", 3))
    prompts = [
        tokenizer(train.chat(tokenizer, row.text), add_special_tokens=False)["input_ids"] for row in rows
    ]
    answers = [tokenizer(row.expected + train.END, add_special_tokens=False)["input_ids"] for row in rows]
    examples = [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.inference_mode():
        together = train.answer_loss(model, train.to_batch(train.pack(examples)))
        alone = [train.answer_loss(model, train.to_batch([[example]])) for example in examples]
    tokens = torch.tensor([float(len(answer)) for answer in answers])
    assert len(train.pack(examples)) < len(examples)
    torch.testing.assert_close(
        together, (torch.stack(alone) * tokens).sum() / tokens.sum(), rtol=1e-3, atol=1e-6
    )


def test_the_trainer_holds_the_scored_rows_back(unseen: list[orders.Row]) -> None:
    held_out = train.held_out_texts()
    assert held_out.issuperset(row.text for row in unseen)
    assert held_out.issuperset(pq.read_table(FOLDER / "orders.parquet", columns=["text"])["text"].to_pylist())


def test_the_model_reads_orders(tokenizer: Any, model: Any, unseen: list[orders.Row]) -> None:
    some = unseen[:200]
    answers = train.answer_all(model, tokenizer, [row.text for row in some])
    assert orders.score(answers, [row.expected for row in some]) >= 0.97


def test_padding_does_not_change_an_answer(tokenizer: Any, model: Any, unseen: list[orders.Row]) -> None:
    texts = [row.text for row in unseen[:12]]
    assert train.answer_all(model, tokenizer, texts, batch_rows=1) == train.answer_all(
        model, tokenizer, texts
    )
