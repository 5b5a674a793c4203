"""What users get wrong in a job file: each is answered by one line with what, where and how to fix it."""

from __future__ import annotations

from mistakes import job_of, mistakes, refused

# Text in place of a whole job file.
FILES = (
    ("an empty file", "", "job.yaml", "start with input, prompt, model"),
    ("a list", "- input\n- prompt\n", "job.yaml", "start with input, prompt, model"),
    ("plain text", "summarise all reviews", "job.yaml", "start with input, prompt, model"),
    ("a tab", "input:\n\tpath: x\n", "job.yaml:2", "use spaces"),
    ("a missing colon", "input:\n  path x\n  limit: 3\n", "job.yaml:3", "fix the line"),
    ("an open quote", 'input:\n  path: "x\nprompt: {}\n', "job.yaml:2", "close it"),
    ("an open bracket", "input:\n  columns: [a, b\n", "job.yaml:2", "close it"),
    ("unquoted braces", "prompt:\n  template: {{ text }}\n", "job.yaml:2", "quotes"),
    ("braces at the front", "prompt:\n  template: {{ text }} is it good?\n", "job.yaml:2", "quotes"),
    ("a colon in a text", "prompt:\n  template: Question: {{ text }}\n", "job.yaml:2", "quotes"),
    ("a key twice", "input:\n  path: a\n  path: b\n", "job.yaml:3", "remove one"),
    ("a number as a key", "input:\n  1: a\n", "job.yaml:2", "quotes"),
    ("wrong indentation", "input:\n  path: a\n limit: 3\n", "job.yaml:3", "fix the line"),
    ("two documents", "input: {path: a}\n---\nprompt: {column: b}\n", "job.yaml:2", "one job"),
    ("an unknown alias", "input: {path: *lake}\n", "job.yaml:1", "quotes"),
    ("a star without quotes", "input:\n  path: *.parquet\n", "job.yaml:2", "quotes"),
    ("JSON", '{"input": {"path": "x",}\n', "job.yaml:1", "close it"),
    ("a Python tag", "input: !!python/object:os.system {}\n", "job.yaml:1", "without a !tag"),
    ("a byte that is no UTF-8", b"input: {path: caf\xe9}\n", "job.yaml", "UTF-8"),
    ("a Parquet file", b"PAR1\x00\x01\x02\xff", "job.yaml", "YAML"),
)

# Sections in place of those of a right job; None takes one out.
SECTIONS = (
    ("no input", {"input": None}, "input is missing", "add"),
    ("no prompt", {"prompt": None}, "prompt is missing", "add"),
    ("no model", {"model": None}, "model is missing", "add"),
    ("no output", {"output": None}, "output is missing", "add"),
    ("no input path", {"input": {"path": None}}, "input.path", "give"),
    ("a section of text", {"input": "reviews.parquet"}, "input", "mapping"),
    ("a model of text", {"model": "org/name"}, "model", "mapping"),
    ("a list of sections", {"generation": [{"max_new_tokens": 3}]}, "generation", "mapping"),
    ("an unknown section", {"outputs": {"path": "x"}}, "unknown key outputs", "did you mean 'output'?"),
    ("an unknown input key", {"input": {"paths": "x"}}, "unknown key input.paths", "did you mean 'path'?"),
    ("an unknown prompt key", {"prompt": {"tempalte": "x"}}, "prompt.tempalte", "did you mean 'template'?"),
    ("an unknown model key", {"model": {"nam": "x"}}, "model.nam", "did you mean 'name'?"),
    ("another tool's key", {"generation": {"max_tokens": 9}}, "generation.max_tokens", "'max_new_tokens'?"),
    ("an unknown engine key", {"engine": {"knd": "paged"}}, "engine.knd", "did you mean 'kind'?"),
    ("an unknown output key", {"output": {"colums": {}}}, "output.colums", "did you mean 'columns'?"),
    ("an unknown cluster key", {"cluster": {"worker": 2}}, "cluster.worker", "did you mean 'workers'?"),
    ("an unknown limit", {"limits": {"max_costs": 2}}, "limits.max_costs", "did you mean 'max_cost'?"),
    ("an unknown notify key", {"notify": {"urll": "https://x"}}, "notify.urll", "did you mean 'url'?"),
    (
        "no prompt at all",
        {"prompt": {"template": None}},
        "prompt",
        "exactly one of template, messages, column",
    ),
    ("two prompts", {"prompt": {"column": "text"}}, "prompt", "exactly one of template, messages, column"),
    (
        "messages of text",
        {"prompt": {"template": None, "messages": ["hi"]}},
        "prompt.messages.0",
        "the keys role, content",
    ),
    ("no message", {"prompt": {"template": None, "messages": []}}, "prompt.messages", "at least one"),
    (
        "a message without a role",
        {"prompt": {"template": None, "messages": [{"content": "hi"}]}},
        "prompt.messages.0.role is missing",
        "add",
    ),
    (
        "a misspelt message key",
        {"prompt": {"template": None, "messages": [{"role": "user", "text": "{{ text }}", "content": "x"}]}},
        "prompt.messages.0.text",
        "did you mean 'content'?",
    ),
    ("truncate on both sides", {"prompt": {"truncate": "both"}}, "prompt.truncate", "'left' or 'right'"),
    ("a limit of 0", {"input": {"limit": 0}}, "input.limit", "at least 1"),
    ("a limit in words", {"input": {"limit": "all"}}, "input.limit", "a whole number"),
    ("half a row", {"input": {"limit": 2.5}}, "input.limit", "a whole number"),
    ("a path of a number", {"input": {"path": 2026}}, "input.path", "quotes"),
    ("no paths", {"input": {"path": []}}, "input.path", "at least one"),
    ("an empty path", {"input": {"path": ""}}, "input.path", "give"),
    ("columns of text", {"input": {"columns": "text"}}, "input.columns", "a list"),
    ("since yesterday", {"input": {"since": "yesterday"}}, "input.since", "'last'"),
    ("since and limit", {"input": {"since": "last", "limit": 3}}, "limit", "without since"),
    ("neither yes nor no", {"input": {"allow_empty": "maybe"}}, "input.allow_empty", "true or false"),
    ("a bad dtype", {"model": {"dtype": "fp16"}}, "model.dtype", "'float16'"),
    ("an int8 dtype", {"model": {"dtype": "int8"}}, "model.dtype", "'bfloat16'"),
    ("an empty model name", {"model": {"name": ""}}, "model.name", "give"),
    ("no new tokens", {"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens", "at least 1"),
    ("many new tokens", {"generation": {"max_new_tokens": "1k"}}, "max_new_tokens", "a whole number"),
    ("a cold temperature", {"generation": {"temperature": -1}}, "generation.temperature", "at least 0"),
    ("an endless temperature", {"generation": {"temperature": float("inf")}}, "temperature", "finite"),
    ("a temperature that is none", {"generation": {"temperature": float("nan")}}, "temperature", "finite"),
    ("top_p in percent", {"generation": {"top_p": 95}}, "generation.top_p", "at most 1"),
    ("top_p of 0", {"generation": {"top_p": 0}}, "generation.top_p", "above 0"),
    ("top_k of -1", {"generation": {"top_k": -1}}, "generation.top_k", "at least 0"),
    ("min_p above 1", {"generation": {"min_p": 2}}, "generation.min_p", "at most 1"),
    ("no penalty", {"generation": {"repetition_penalty": 0}}, "repetition_penalty", "above 0"),
    ("an empty stop", {"generation": {"stop": [""]}}, "generation.stop", "leave it out"),
    ("a stop of text", {"generation": {"stop": "END"}}, "generation.stop", "a list"),
    ("a seed of text", {"generation": {"seed": "lucky"}}, "generation.seed", "a whole number"),
    (
        "an unknown engine",
        {"engine": {"kind": "vllm"}},
        "engine.kind",
        "auto, padded, paged, or module:Class",
    ),
    ("all the GPU's memory", {"engine": {"memory_fraction": 1}}, "engine.memory_fraction", "below 1"),
    ("the GPU's memory in percent", {"engine": {"memory_fraction": "90%"}}, "memory_fraction", "a number"),
    ("many steps", {"engine": {"decode_steps": 100}}, "engine.decode_steps", "at most 64"),
    ("no rows in a part", {"output": {"rows_per_part": 0}}, "output.rows_per_part", "at least 1"),
    ("unknown compression", {"output": {"compression": "brotli"}}, "output.compression", "'zstd'"),
    (
        "renaming no column",
        {"output": {"columns": {"answr": "x"}}},
        "output.columns",
        "did you mean 'answer'?",
    ),
    ("renaming to nothing", {"output": {"columns": {"answer": ""}}}, "output.columns", "a name"),
    ("failed rows in data", {"output": {"failed": "data"}}, "output.failed", "such as failed"),
    ("failed rows elsewhere", {"output": {"failed": "../failed"}}, "output.failed", "such as failed"),
    ("an empty output", {"output": {"path": ""}}, "output.path", "give"),
    ("a port out of range", {"cluster": {"metrics_port": 99999}}, "cluster.metrics_port", "1 to 65535"),
    ("no workers", {"cluster": {"workers": 0}}, "cluster.workers", "at least 1"),
    ("a negative price", {"cluster": {"price_per_gpu_hour": -1}}, "price_per_gpu_hour", "at least 0"),
    ("a price in dollars", {"cluster": {"price_per_gpu_hour": "$2"}}, "price_per_gpu_hour", "a number"),
    ("a bad memory limit", {"cluster": {"memory_limit": "lots"}}, "cluster.memory_limit", "16GiB"),
    (
        "two clusters",
        {"cluster": {"address": "tcp://h:8786", "slurm": {}}},
        "cluster",
        "at most one of address, slurm, kubernetes",
    ),
    (
        "TLS without an address",
        {"cluster": {"tls": {"ca": "a", "cert": "b", "key": "c"}}},
        "cluster",
        "tls://",
    ),
    ("half of TLS", {"cluster": {"address": "tls://h:1", "tls": {"ca": "a"}}}, "cluster.tls.cert", "add"),
    ("an error rate in percent", {"limits": {"max_error_rate": 5}}, "limits.max_error_rate", "at most 1"),
    ("a deadline in words", {"limits": {"deadline": "tomorrow"}}, "limits.deadline", "such as 6h"),
    ("a deadline of half an hour", {"limits": {"deadline": "0.5h"}}, "limits.deadline", "such as 6h"),
    ("a deadline that is no date", {"limits": {"deadline": "2026-02-30"}}, "limits.deadline", "such as 6h"),
    ("a deadline of a number", {"limits": {"deadline": 6}}, "limits.deadline", "such as 6h"),
    ("a deadline without end", {"limits": {"deadline": "99999999999d"}}, "limits.deadline", "such as 6h"),
    ("a cost without a price", {"limits": {"max_cost": 20}}, "limits.max_cost", "cluster.price_per_gpu_hour"),
    ("no cost at all", {"limits": {"max_cost": 0}}, "limits.max_cost", "above 0"),
    ("a webhook without https", {"notify": {"url": "hooks.slack.com/x"}}, "notify.url", "https://"),
    ("mail", {"notify": {"url": "https://x.org", "format": "mail"}}, "notify.format", "'slack'"),
    ("an undefined variable", {"input": {"path": "${NOT_SET_ANYWHERE}"}}, "NOT_SET_ANYWHERE", "export"),
    ("a password in a URL", {"input": {"path": "s3://me:secret@lake/x"}}, "input.path", "storage_options"),
    ("a signed URL", {"output": {"path": "https://x.org/a?sig=abc"}}, "output.path", "storage_options"),
    ("an unknown protocol", {"output": {"path": "s4://lake/x"}}, "s4://lake/x", "did you mean 's3'?"),
    ("a bucket without s3://", {"input": {"path": "s3:/lake/x"}}, "s3:/lake/x", "s3://"),
    (
        "an image in a message",
        {
            "prompt": {
                "template": None,
                "messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            }
        },
        "prompt.messages.0.content: part 0 has the type 'image'",
        "use {type: text, text: ...}",
    ),
    (
        "a part without its type",
        {"prompt": {"template": None, "messages": [{"role": "user", "content": [{"text": "x"}]}]}},
        "prompt.messages.0.content",
        "write {type: text, text: ...}",
    ),
    (
        "a tool without a name",
        {"prompt": {"tools": [{"type": "function", "function": {"parameters": {}}}]}},
        "prompt.tools: tool 0",
        "write {type: function, function: {name: ...}}",
    ),
    (
        "tools of text",
        {"prompt": {"tools": "get_weather"}},
        "prompt.tools",
        "a list of tools, or {column: name}",
    ),
    ("tools without messages", {"prompt": {"tools": [{"name": "now"}]}}, "prompt: tools", "use messages"),
    (
        "tools as a variable",
        {"prompt": {"template_kwargs": {"tools": []}}},
        "prompt.template_kwargs",
        "prompt.tools",
    ),
    (
        "one marker",
        {"answer": {"reasoning": "why", "reasoning_markers": ["<a>"]}},
        "answer",
        "[opening, closing]",
    ),
    ("markers alone", {"answer": {"reasoning_markers": ["<a>", "</a>"]}}, "answer", "name a column"),
    ("options of text", {"input": {"storage_options": "anon"}}, "input.storage_options", "mapping"),
)


@mistakes(*FILES)
def test_a_file_that_is_no_job_is_refused_in_one_line(mistake, tmp_path):
    text = mistake.make if isinstance(mistake.make, bytes) else mistake.make.encode()
    job = tmp_path / "job.yaml"
    job.write_bytes(text)
    refused("run", job, where=mistake.where, fix=mistake.fix)


@mistakes(*SECTIONS)
def test_a_wrong_key_or_value_is_refused_in_one_line(mistake, tmp_path):
    refused("run", job_of(tmp_path, **mistake.make), where=mistake.where, fix=mistake.fix)
