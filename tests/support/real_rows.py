"""Real English on every machine that has Python: its own reference manual, cut into rows of skewed lengths."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

TOKENIZER = Path(__file__).parents[2] / "jobs/quickstart/model"
MAX_CONTEXT = 8192

QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# The shape of Qwen3-0.6B, and one that loads at once.
LARGE = {
    **QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8,
}  # fmt: skip
SMALL = {
    **QWEN3, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def texts(rows: int, seed: int = 0) -> list[str]:
    """The same rows for the same seed: 57 to 30,000 characters, 285 in the median, a third with a shared beginning, one
    in twenty a copy of another, and the longest spread among the rest."""
    rng = np.random.default_rng(seed)
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    lengths = np.clip(np.exp(rng.normal(np.log(285), 0.9, rows)), 57, 8000).astype(int)
    lengths[rng.integers(0, rows, max(1, rows // 500))] = 30_000
    starts = rng.integers(0, len(manual) - 30_000, rows)
    shared = rng.random(rows) < 0.33
    beginnings = starts[: max(1, rows // 40)]
    made = [
        (manual[(at := beginnings[i % len(beginnings)]) : at + length // 2] if shared[i] else "")
        + manual[start : start + length]
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    for i in np.flatnonzero(rng.random(rows) < 0.05)[1:]:
        made[i] = made[i // 2]
    return made


def prompts(rows: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids of `texts` by the quickstart's tokenizer, at most `MAX_CONTEXT` - 64 of each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer(["Describe: " + text for text in texts(rows, seed)])["input_ids"]
    return [np.array(row[: MAX_CONTEXT - 64], np.int32) for row in ids]


def config(shape: dict[str, Any]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    return transformers.AutoConfig.for_model(**shape, vocab_size=-(-len(tokenizer) // 64) * 64)


def model(shape: dict[str, Any]) -> Any:
    """With random weights, the same ones each time, on the GPU in bfloat16."""
    with torch.device("cuda"), torch.random.fork_rng(["cuda"]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16).eval()


def model_folder(shape: dict[str, Any], folder: Path) -> Path:
    """The same with its tokenizer, as a folder to name in a job."""
    model(shape).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(saved | {"model_max_length": 40960}))
    return folder


def write_rows(path: Path, rows: int) -> None:
    """A Parquet file of `texts` in column `text`, numbered in `id`, in row groups of 4,096."""
    pq.write_table(pa.table({"id": range(rows), "text": texts(rows)}), path, row_group_size=4096)
