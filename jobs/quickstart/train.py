"""Trains the quickstart's tokenizer and model on endless fresh order lines and writes them to model/.

A few minutes on one GPU: `python train.py --minutes 5`. It also runs on a CPU, where it needs hours.

The weights beside it took 4.8 minutes on one H200, with dates that came in seasons, and then 13 on a CPU with
dates of all seasons (`--start model --minutes 13 --blocks 4 --rate 4e-4 --seed 2`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orders
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 1536
BLOCK = 512  # tokens in a packed block: the longest order with its answer fits
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
MAX_NEW_TOKENS = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' ~ message.role) }}{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token of its own: numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def chat(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The whole prompt of one order text, up to where the answer starts."""
    messages = [{"role": "user", "content": orders.prompt(text)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class PackedOrders(IterableDataset):
    """Endless batches of fresh orders, several in a block.

    A batch is (ids, segments, positions, answers), each (blocks, BLOCK), the last one bool, the others int64.
    `segments` numbers the orders of a block from 1 (0 is padding); `answers` marks the tokens to be learned.
    No text of the dataset or of the test rows is among them.
    """

    POOL = 512  # orders packed together

    def __init__(self, tokenizer: PreTrainedTokenizerFast, blocks: int, seed: int) -> None:
        self.tokenizer, self.blocks, self.seed = tokenizer, blocks, seed
        self.held_out = held_out_texts()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = torch.utils.data.get_worker_info()
        source = orders.rows(f"train {self.seed} {worker.id if worker else 0}")
        rng = random.Random(self.seed)
        # The template around an order never changes, so it is rendered once and not for every row.
        head, tail = chat(self.tokenizer, "\0").split("\0")
        waiting: list[list[tuple[list[int], int]]] = []
        while True:
            pool = [row for row in itertools.islice(source, self.POOL) if row.text not in self.held_out]
            prompts = self._encode([head + row.text + tail for row in pool])
            answers = self._encode([row.expected + END for row in pool])
            waiting += pack([(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)])
            rng.shuffle(waiting)
            while len(waiting) >= self.blocks:
                yield to_batch(waiting[: self.blocks])
                del waiting[: self.blocks]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


def held_out_texts() -> frozenset[str]:
    """The texts that the trainer must never see."""
    dataset = orders.rows(orders.DATASET_SEED, orders.DATASET_ROWS)
    test = orders.rows(orders.TEST_SEED, orders.TEST_ROWS)
    return frozenset(row.text for row in itertools.chain(dataset, test))


def pack(examples: list[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    """First fit, the longest first: lists of examples that fill at most BLOCK tokens."""
    blocks: list[list[tuple[list[int], int]]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example[0])):
        size = len(example[0])
        if size > BLOCK:
            raise ValueError(f"an order of {size} tokens is longer than a block of {BLOCK}")
        fit = next((i for i, free in enumerate(room) if free >= size), None)
        if fit is None:
            fit = len(blocks)
            blocks.append([])
            room.append(BLOCK)
        blocks[fit].append(example)
        room[fit] -= size
    return blocks


def to_batch(blocks: list[list[tuple[list[int], int]]]) -> tuple[torch.Tensor, ...]:
    ids, segments, positions, answers = (torch.zeros(len(blocks), BLOCK, dtype=torch.long) for _ in range(4))
    for b, block in enumerate(blocks):
        start = 0
        for number, (tokens, prompt_tokens) in enumerate(block, 1):
            end = start + len(tokens)
            ids[b, start:end] = torch.tensor(tokens)
            segments[b, start:end] = number
            positions[b, start:end] = torch.arange(len(tokens))
            answers[b, start + prompt_tokens : end] = 1
            start = end
    return ids, segments, positions, answers.bool()


def answer_loss(model: Qwen3ForCausalLM, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens. Orders of one block do not see each other."""
    ids, segments, positions, answers = batch
    causal = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=ids.device).tril()
    mask = (segments[:, :, None] == segments[:, None, :])[:, None] & causal
    hidden = model.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    learned = answers[:, 1:]
    logits = model.lm_head(hidden[:, :-1][learned])
    return cross_entropy(logits.float(), ids[:, 1:][learned])


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    minutes: float,
    blocks: int,
    peak_rate: float,
    workers: int,
    seed: int,
) -> None:
    """AdamW, float32 weights, bfloat16 autocast; the cosine schedule runs on the clock, to end in time."""
    device = model.device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    loader = DataLoader(
        PackedOrders(tokenizer, blocks, seed),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    check_rows = list(orders.rows(f"check {seed}", 250))
    start = time.monotonic()
    checks = 1
    model.train()
    for step, batch in enumerate(loader):
        progress = (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            break
        rate = peak_rate * min(1.0, progress / 0.04) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            loss = answer_loss(model, tuple(tensor.to(device, non_blocking=True) for tensor in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress >= checks / 10:
            checks += 1
            share = orders.score(
                answer_all(model, tokenizer, [r.text for r in check_rows]), [r.expected for r in check_rows]
            )
            print(f"{progress:4.0%}  step {step}  loss {loss.item():.4f}  rows right {share:.1%}", flush=True)
            model.train()


@torch.inference_mode()
def answer_all(model: Any, tokenizer: Any, texts: Sequence[str], batch_rows: int = 125) -> list[str]:
    """Greedy answers through plain `generate`, rows of similar length together, padded on the left."""
    model.eval()
    answers = [""] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(by_length), batch_rows):
        chunk = by_length[start : start + batch_rows]
        inputs = tokenizer(
            [chat(tokenizer, texts[i]) for i in chunk],
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        prompt, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        output = model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        decoded = tokenizer.batch_decode(output[:, prompt.shape[1] :], skip_special_tokens=True)
        for i, answer in zip(chunk, decoded, strict=True):
            answers[i] = answer
    return answers


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(folder: Path) -> None:
    """Scores the saved model, loaded as float32, on the test rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    rows = list(orders.rows(orders.TEST_SEED, orders.TEST_ROWS))
    answers, truths = answer_all(model, tokenizer, [row.text for row in rows]), [row.expected for row in rows]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    print(f"rows right: {orders.score(answers, truths):.2%} of {len(rows)}")
    right = Counter(
        field for pair in zip(answers, truths, strict=True) for field in orders.right_fields(*pair)
    )
    print("  ".join(f"{field} {right[field] / len(rows):.1%}" for field in orders.FIELDS))
    for row, answer in zip(rows, answers, strict=True):
        if len(orders.right_fields(answer, row.expected)) < len(orders.FIELDS):
            print(json.dumps({"text": row.text, "truth": row.expected, "answer": answer}, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=5, help="training time, after which the rate has come to 0"
    )
    parser.add_argument("--blocks", type=int, default=64, help=f"blocks of {BLOCK} tokens in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that write orders"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="a model folder to go on from; a fresh model by default")
    parser.add_argument("--to", type=Path, default=orders.HERE / "model")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.start is None:
        texts = [part for row in orders.rows("tokenizer", 20_000) for part in (row.text, row.expected)]
        tokenizer = build_tokenizer([orders.INSTRUCTION, *texts])
        model = build_model(tokenizer).to(device)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
        model = AutoModelForCausalLM.from_pretrained(options.start, dtype=torch.float32).to(device)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every data process has one core
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    train(
        model,
        tokenizer,
        minutes=options.minutes,
        blocks=options.blocks,
        peak_rate=options.rate,
        workers=options.workers,
        seed=options.seed,
    )
    save(model, tokenizer, options.to)
    report(options.to)


if __name__ == "__main__":
    main()
