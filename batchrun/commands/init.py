"""`batchrun init`: a commented job file for a dataset that is pointed at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchrun.dataset.location import open_parquet
from batchrun.dataset.source import Source, read_source
from batchrun.errors import InputError, OutputError
from batchrun.job.output import OUTPUT_COLUMNS
from batchrun.job.schema import json_schema
from batchrun.job.settings import InputSettings
from batchrun.prompt.columns import holds_messages, holds_text

MODEL = "Qwen/Qwen3-0.6B"
# Rows that tell how long a column's texts are.
LOOKED_AT = 200
# Characters of an example.
SHOWN = 60
# Names that say that a column is the prompt, or what it is made of; the likeliest first.
LIKELY_PROMPTS = (
    "prompt",
    "messages",
    "conversation",
    "conversations",
    "text",
    "content",
    "question",
    "instruction",
    "document",
    "body",
    "review",
    "comment",
    "message",
    "input",
)


def init(dataset: str, out: Path, model: str = MODEL) -> list[Path]:
    """Writes the job file, and the JSON Schema that editors check it with beside it; both paths.

    Raises:
        InputError: what `batchrun plan` would say of the dataset, or no column can be made a prompt.
        OutputError: the job file is there already, or cannot be written.
    """
    if out.exists():
        raise OutputError("is there already", str(out), "give another name with --out, or remove it")
    source = read_source(InputSettings(path=_absolute(dataset)), [])
    head = _head(source)
    schema_file = out.with_name("job.schema.json")
    text = job_text(dataset, source.schema, head, out, model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        schema_file.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", str(out), "give another --out") from None
    return [out, schema_file]


def job_text(dataset: str, schema: pa.Schema, head: pa.Table, out: Path, model: str) -> str:
    """The job file's text. `head` are a few rows of the data, for examples."""
    name = prompt_column(schema, head)
    rename = _taken(schema.names)
    # A comment ends with its line, so nothing out of the data may break it.
    columns = "\n".join(
        f"#   {_one_line(field.name)}: {field.type}{_example(head, field.name)}" for field in schema
    )
    return f"""\
# yaml-language-server: $schema=job.schema.json
# Written by `batchrun init`. What it found:
{columns}
# See what it would do with `batchrun plan {out.name}` (--trial 60s tells how long it takes), then start it with
# `batchrun run {out.name}`. Paths are taken from this file's folder; ${{NAME}} comes from the environment.

input:
  path: {_text(_relative(dataset, out))}
  # columns: {json.dumps(schema.names[:4], ensure_ascii=False)}    # carried into the output; all by default
  # limit: 1000                     # the first rows only, to try the job out

prompt:                             # exactly one of column, template, messages
{_prompt(schema, name, model)}
  # truncate: right                 # cut a prompt that is too long; otherwise it is that row's error

model:
  name: {_text(_relative(model, out) if os.path.isdir(model) else model)}    # a hub id, or a folder or its URL

generation:
  max_new_tokens: 256               # the longest answer, in tokens; more of them leave less room for a prompt
  temperature: 0                    # greedy: the same answers in every run
  # stop: ["\\n\\n"]

output:
  path: {_text(_output(dataset))}    # a folder or URL; data/ in it holds the answers, _job/ the rest
{rename}
# cluster:
#   price_per_gpu_hour: 2.50        # then `batchrun plan` tells what it costs, and limits.max_cost can stop it
# limits:
#   max_cost: 20                    # stop once it has cost this much; the same command goes on
#   deadline: 6h                    # or a time, 2026-01-31T06:00
"""


def prompt_column(schema: pa.Schema, head: pa.Table) -> str:
    """The column that most likely is the prompt, or what it is made of: by its name, else the longest texts.

    Raises:
        InputError: no column holds texts or messages.
    """
    usable: list[str] = [
        f.name for f in schema if holds_messages(f.type) or (holds_text(f.type) and f.type != pa.null())
    ]
    if not usable:
        raise InputError(
            f"no column holds texts or messages ({', '.join(map(str, schema.types))})",
            "init",
            "write the job by hand, with a prompt.template over the columns that there are",
        )
    ranked = {name: i for i, name in enumerate(LIKELY_PROMPTS)}
    return min(
        usable, key=lambda n: (ranked.get(n.lower(), len(ranked)), not _is_list(schema, n), -_length(head, n))
    )


def _prompt(schema: pa.Schema, name: str, model: str) -> str:
    if _is_list(schema, name):
        return f"  column: {_text(name)}    # ready conversations: lists of role and content"
    if not name.isidentifier():
        return f"  column: {_text(name)}    # sent as it is; a template can only name columns without spaces or dots"
    if os.path.isdir(model) and not _chats(Path(model)):
        return (
            "  # Jinja over the row's columns. The model has no chat template: it goes on from where this ends.\n"
            f'  template: "{{{{ {name} }}}}"'
        )
    return (
        "  messages:                         # Jinja over the row's columns, through the model's chat template\n"
        "    # - {role: system, content: You answer with one word.}\n"
        f'    - {{role: user, content: "{{{{ {name} }}}}"}}'
    )


def _chats(model: Path) -> bool:
    config = model / "tokenizer_config.json"
    named = config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
    return named or (model / "chat_template.jinja").is_file()


def _taken(names: Sequence[str]) -> str:
    """The line that renames output columns whose names the input has."""
    free = {
        own: next(f"{own}_{i}" for i in count(2) if f"{own}_{i}" not in names)
        for own in OUTPUT_COLUMNS
        if own in names
    }
    return f"  columns: {json.dumps(free)}    # the input has columns of these names\n" if free else ""


def _head(source: Source) -> pa.Table:
    for file in source.files:
        if file.rows:
            with open_parquet(file.path, {}) as parquet:
                return pa.Table.from_batches([next(parquet.iter_batches(LOOKED_AT))])
    return source.schema.empty_table()


def _length(head: pa.Table, name: str) -> float:
    """Mean length of the column's texts, 0 where it has none."""
    if name not in head.column_names or not holds_text(head.schema.field(name).type):
        return 0.0
    return (
        pc.mean(pc.binary_length(head[name].cast(pa.large_string()).cast(pa.large_binary()))).as_py() or 0.0
    )


def _example(head: pa.Table, name: str) -> str:
    if name not in head.column_names or not holds_text(head.schema.field(name).type):
        return ""
    texts = head[name].cast(pa.large_string()).drop_null()
    if not len(texts):
        return ", all null"
    text = _one_line(texts[0].as_py())
    return f', such as "{text[:SHOWN]}{"…" if len(text) > SHOWN else ""}"'


def _is_list(schema: pa.Schema, name: str) -> bool:
    return holds_messages(schema.field(name).type)


def _one_line(text: str) -> str:
    """One line of printable text."""
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text))


def _text(value: str) -> str:
    """Plain where YAML takes it for this text, else quoted."""
    plain = re.fullmatch(r"[A-Za-z./][\w./@=+-]*", value) and value.lower() not in (
        "null",
        "true",
        "false",
        "yes",
        "no",
    )
    return value if plain else json.dumps(value, ensure_ascii=False)


def _absolute(dataset: str) -> str:
    return dataset if "://" in dataset else os.path.abspath(os.path.expanduser(dataset))


def _relative(path: str, out: Path) -> str:
    if "://" in path:
        return path
    relative = os.path.relpath(_absolute(path), out.resolve().parent)
    return relative if not relative.startswith("../../..") else _absolute(path)


def _output(dataset: str) -> str:
    if "://" in dataset:
        return f"{re.split(r'[*?[]', dataset)[0].rstrip('/').removesuffix('.parquet')}-answers"
    return "answers"
