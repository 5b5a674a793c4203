"""Tiny tokenizers and Parquet files for the tests of dataset and prompt: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from batchrun.dataset.plan import Partition, Plan
from batchrun.dataset.planner import make_plan
from batchrun.dataset.reader import RowBatch, read_partition
from batchrun.job.settings import InputSettings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)


def byte_tokenizer(
    chat_template: str | None = CHATML, bos: bool = True, **special: Any
) -> PreTrainedTokenizerFast:
    """A token per UTF-8 byte; ids 0 to 3 are <s>, </s>, <|im_start|>, <|im_end|>; `bos` adds <s>."""
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {name: i for i, name in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)


def write(path: Path, columns: dict[str, Any] | pa.Table, groups: int | None = None, **how: Any) -> Path:
    """A Parquet file with row groups of `groups` rows."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups, **how)
    return path


def plan_of(
    settings: InputSettings,
    needed: tuple[str, ...] = (),
    rows: int = 8192,
    size: int = 1 << 28,
    leading: tuple[str, ...] = (),
) -> Plan:
    return make_plan(settings, needed, rows, size, leading=leading)


def batches_of(plan: Plan, settings: InputSettings, partition: Partition, **how: Any) -> list[RowBatch]:
    if partition.order:
        how["order"] = partition.places
    return list(
        read_partition(
            partition.slices,
            plan.files_of(partition),
            plan.schema,
            plan.schema.names,
            settings.filters,
            settings.cast,
            settings.storage_options,
            **how,
        )
    )


def rows_of(plan: Plan, settings: InputSettings) -> pa.Table:
    """Everything that the plan's partitions give, in order."""
    batches = [b.records for p in plan.partitions for b in batches_of(plan, settings, p)]
    return pa.Table.from_batches(batches, plan.schema)
