"""The job file: a typed model, its validation, and the hash of what decides the outputs."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from batchrun.errors import JobError
from batchrun.limits import parse_deadline

# Values of storage options that may be shown: everything else there is taken for a secret.
HARMLESS_OPTIONS = {"anon", "endpoint_url", "region", "region_name", "use_ssl", "account_name", "project"}

OUTPUT_COLUMNS = ("answer", "finish_reason", "prompt_tokens", "output_tokens", "status", "error")


class Settings(BaseModel):
    """A section of the job file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class InputSettings(Settings):
    path: str | list[str] = Field(description="a file, folder, glob, or a list of them, on any fsspec URL")
    columns: list[str] | None = Field(None, description="columns carried into the output; all by default")
    filters: list[Any] | None = Field(
        None, description="rows to keep, in pyarrow's form: [[column, op, value], ...]"
    )
    limit: int | None = Field(None, ge=1, description="the first so many rows only")
    since: Literal["last"] | None = Field(
        None, description="last: only files that no earlier run into this output took"
    )
    cast: dict[str, str] = Field(default_factory=dict, description="column: type, where files differ")
    skip_bad_files: bool = Field(False, description="leave unreadable files out, recorded in the plan")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="fsspec's options for the input; never written anywhere"
    )

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @model_validator(mode="after")
    def _no_limit_on_growth(self) -> Self:
        if self.since is not None and self.limit is not None:
            raise ValueError("limit leaves rows of taken files out for ever; use it without since")
        return self


class Message(Settings):
    role: str = Field(description="system, user or assistant, as the chat template knows them")
    content: str = Field(description="Jinja text over the row's columns")


class PromptSettings(Settings):
    template: str | None = Field(None, description="Jinja text over the row's columns, sent as it is")
    messages: list[Message] | None = Field(None, description="Jinja messages through the chat template")
    column: str | None = Field(None, description="a ready column: text, or a list of role/content structs")
    chat_template: str | None = Field(None, description="used instead of the tokenizer's own chat template")
    truncate: Literal["left", "right"] | None = Field(
        None, description="the side cut off a prompt that is too long"
    )
    empty: Literal["fail", "send"] = Field("fail", description="what an empty prompt becomes")
    max_bytes: int = Field(1 << 20, ge=1, description="a longer rendered prompt is never tokenized whole")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(v is not None for v in (self.template, self.messages, self.column)) != 1:
            raise ValueError("give exactly one of template, messages, column")
        return self


class ModelSettings(Settings):
    name: str = Field(description="hub id, local folder, or fsspec URL of a folder")
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    tokenizer: str | None = Field(None, description="a tokenizer from elsewhere; the model's own by default")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto is float32 on a CPU, half precision on a GPU"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(False, description="load weights from pickle files, which can run code")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="fsspec's options for the model; never written anywhere"
    )


class GenerationSettings(Settings):
    max_new_tokens: int = Field(
        256, ge=1, description="an answer is cut there; also what a row's room is for"
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this share")
    top_k: int = Field(0, ge=0, description="sample from so many likeliest tokens; 0 is all")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens below this share of the likeliest")
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1, tokens that were there are less likely"
    )
    stop: list[str] = Field(default_factory=list, description="texts that end an answer; not part of it")
    seed: int = Field(
        0,
        ge=-(1 << 63),
        lt=1 << 63,
        description="with a row's place and the position it decides the sampling",
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty stop text would end every answer at once")
        return stop


class EngineSettings(Settings):
    kind: str = Field("auto", description="auto, padded, paged, or module:Class of an engine of your own")
    batch_tokens: int | None = Field(
        None, ge=1, description="padded: prompt + new tokens of one batch, padding included"
    )
    window_rows: int = Field(8192, ge=1, description="rows looked ahead at, and ordered by length together")
    max_rows: int | None = Field(None, ge=1, description="paged: rows that decode at once; 2048 on a GPU")
    prefill_tokens: int | None = Field(None, ge=1, description="paged: prompt tokens computed at once")
    decode_steps: int = Field(8, ge=1, le=64, description="paged: steps between two looks at the results")
    memory_fraction: float = Field(0.9, gt=0, lt=1, description="paged: share of the GPU's memory to use")
    cache_tokens: int | None = Field(
        None, ge=1, description="paged: at most so many tokens of keys and values"
    )
    compile: bool = Field(True, description="paged: torch.compile for the model on a GPU")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in ("auto", "padded", "paged") and not re.fullmatch(r"[\w.]+:\w+", kind):
            raise ValueError("use auto, padded, paged, or module:Class")
        return kind


class OutputSettings(Settings):
    path: str = Field(description="a folder on any fsspec URL; batchrun owns data/ and _job/ in it")
    columns: dict[str, str] = Field(
        default_factory=dict, description=f"other names for {', '.join(OUTPUT_COLUMNS)}"
    )
    failed: str | None = Field(
        None, description="a folder beside data/: the failed rows alone, each with its place in the input"
    )
    rows_per_part: int = Field(8192, ge=1, description="at most so many rows in a partition and its part")
    bytes_per_part: int = Field(256 << 20, ge=1, description="at most so many input bytes in a partition")
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field("zstd", description="of the parts")
    flush_rows: int = Field(2048, ge=1, description="finished rows are staged once there are so many")
    flush_bytes: int = Field(
        16 << 20, ge=1, description="finished rows are staged once they have so many bytes"
    )
    flush_seconds: float = Field(
        15.0, gt=0, description="finished rows are staged after so many seconds at the latest"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="fsspec's options for the output; never written anywhere",
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in OUTPUT_COLUMNS:
                raise ValueError(f"{name!r} is no output column{nearest(name, OUTPUT_COLUMNS)}")
        return columns

    @field_validator("failed")
    @classmethod
    def _folder_of_its_own(cls, failed: str | None) -> str | None:
        if failed is not None and (failed in ("data", "_job") or not re.fullmatch(r"\w[\w.-]*", failed)):
            raise ValueError("give the name of a folder beside data/ and _job/, such as failed")
        return failed

    def column(self, name: str) -> str:
        """The name that the output column `name` (one of OUTPUT_COLUMNS) has in this job."""
        return self.columns.get(name, name)


class ClusterSettings(Settings):
    address: str | None = Field(None, description="of a running Dask scheduler; a local cluster by default")
    workers: int | None = Field(
        None, ge=1, description="how many; one per GPU of this machine, or one, by default"
    )
    slots: int = Field(2, ge=1, description="partitions at once on a worker")
    memory_limit: str = Field("auto", description="of one local worker, in Dask's form")
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="what an hour of one worker (one GPU) costs, in any currency"
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="where the driver serves Prometheus metrics of the run and all workers",
    )
    slurm: dict[str, Any] | None = Field(
        None, description="workers as Slurm jobs: options of dask-jobqueue's SLURMCluster"
    )
    kubernetes: dict[str, Any] | None = Field(
        None, description="workers as pods: image, name, namespace, resources, env, pod"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.address, self.slurm, self.kubernetes)) > 1:
            raise ValueError("give at most one of address, slurm, kubernetes")
        return self


class LimitSettings(Settings):
    max_error_rate: float = Field(0.2, ge=0, le=1, description="share of failed rows that stops the job")
    error_sample: int = Field(1000, ge=1, description="rows seen before that share counts")
    stall_seconds: float = Field(
        900, gt=0, description="without any progress of a partition before its worker is restarted"
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description="stop, resumable, once all runs of this output together have cost so much: hours of workers "
        "times cluster.price_per_gpu_hour",
    )
    deadline: str | None = Field(
        None,
        description="stop, resumable, at this time: ISO 8601 (local without an offset), or a duration from the "
        "start of the run such as 6h or 1h30m",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="stop, resumable, once so many rows of the output are done; a few more may be by then",
    )

    @field_validator("deadline")
    @classmethod
    def _a_time(cls, deadline: str | None) -> str | None:
        if deadline is not None:
            parse_deadline(deadline, datetime.now().astimezone())
        return deadline


class Job(Settings):
    """One job file. Build it with `Job.load(path)` or from keyword arguments."""

    input: InputSettings = Field(description="which Parquet data, and which of its rows and columns")
    prompt: PromptSettings = Field(
        description="how a row becomes a prompt: exactly one of template, messages, column"
    )
    model: ModelSettings = Field(description="which model and tokenizer")
    generation: GenerationSettings = Field(
        GenerationSettings(), description="how tokens are chosen, in transformers' own words"
    )
    engine: EngineSettings = Field(
        EngineSettings(), description="what runs the model, and its budgets; decides no answer"
    )
    output: OutputSettings = Field(description="where the answers go, and how they are cut and staged")
    cluster: ClusterSettings = Field(ClusterSettings(), description="what it runs on")
    limits: LimitSettings = Field(LimitSettings(), description="when a run stops by itself")

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.limits.max_cost is not None and not self.cluster.price_per_gpu_hour:
            raise ValueError("limits.max_cost needs cluster.price_per_gpu_hour")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Reads a YAML job file, applies `key.path=value` overrides, fills in ${NAME} from the environment.

        Relative paths are taken from the job file's own folder.

        Raises:
            JobError: names the key, what is wrong with it, and the nearest known key where one is misspelt.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(
                f"cannot read the job file ({error})", str(path), "give the path of a YAML file"
            ) from None
        return cls.parse(text, overrides, where=str(path), base=path.resolve().parent)

    @classmethod
    def parse(
        cls, text: str, overrides: Sequence[str] = (), where: str = "job", base: Path | None = None
    ) -> Job:
        """The same from YAML text; `base` is the folder that relative paths start from."""
        tree = _parse_yaml(text, where)
        if not isinstance(tree, dict):
            raise JobError(
                "a job file is a mapping of sections", where, f"start with {', '.join(cls.model_fields)}"
            )
        for override in overrides:
            _apply(tree, override)
        tree = _expand(tree, where)
        try:
            job = cls.model_validate(tree)
        except ValidationError as error:
            raise JobError("; ".join(_explain(e) for e in error.errors()), where) from None
        return job if base is None else job._resolve(base)

    def _resolve(self, base: Path) -> Job:
        paths = [_absolute(p, base) for p in self.input.paths]
        model = self.model.name
        if (base / model).is_dir():
            model = str(base / model)
        tokenizer = self.model.tokenizer
        if tokenizer is not None and (base / tokenizer).is_dir():
            tokenizer = str(base / tokenizer)
        return self.model_copy(
            update={
                "input": self.input.model_copy(update={"path": paths if len(paths) > 1 else paths[0]}),
                "model": self.model.model_copy(update={"name": model, "tokenizer": tokenizer}),
                "output": self.output.model_copy(update={"path": _absolute(self.output.path, base)}),
            }
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the outputs, as plain JSON values: no place, no budget, no secret.

        The model stands in it by name and revision; what its folder holds is pinned beside it by the caller.
        """
        return {
            "input": self.input.model_dump(mode="json", include={"columns", "filters", "limit", "cast"}),
            "prompt": self.prompt.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json", include={"revision", "dtype"}),
            "generation": self.generation.model_dump(mode="json"),
            "output": self.output.model_dump(
                mode="json", include={"columns", "rows_per_part", "bytes_per_part", "compression"}
            ),
        }

    def without_storage_options(self) -> dict[str, Any]:
        """The whole job as plain JSON values, for a record of what ran."""
        return {name: section.model_dump(mode="json", exclude={"storage_options"}) for name, section in self}

    def secrets(self) -> list[str]:
        """Every string in the storage options that must not be shown anywhere."""
        found: list[str] = []
        for options in (self.input.storage_options, self.model.storage_options, self.output.storage_options):
            _collect_secrets(options, found)
        return found


def stable_hash(value: object) -> str:
    """Hex SHA-256 of a JSON value, the same in every process and version of Python."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def nearest(name: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the known name nearest to a misspelt one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a date stays text: `--set input.path=2026-01-31` is a path, and no key may come twice."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise JobError(f"not valid YAML ({what})", place, "mend the line") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise JobError(f"{override!r} is no override", "--set", "write --set key.path=value")
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    try:
        tree[keys[-1]] = _parse_yaml(text, f"--set {path}")
    except JobError:
        tree[keys[-1]] = text  # a template's braces are no YAML; a shell already quotes, so the text is meant


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise JobError(f"environment variable {name} is not set", where, f"export {name}=...")
        return os.environ[name]

    return _VARIABLE.sub(lookup, value)


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}{nearest(location[-1], _keys_beside(location))}"
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = (
        ""
        if "storage_options" in name or isinstance(error["input"], dict | BaseModel)
        else f" (got {error['input']!r})"
    )
    return f"{name or 'job'}: {message}{shown}"


def _keys_beside(location: list[str]) -> list[str]:
    model: type[BaseModel] = Job
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, BaseModel)
        ):
            return ["role", "content"]
        model = field.annotation
    return list(model.model_fields)


def _absolute(path: str, base: Path) -> str:
    """A local path made absolute from `base`; a URL as it is."""
    if "://" in path or "::" in path:
        return path
    return os.path.normpath(base / Path(path).expanduser())


def _collect_secrets(value: Any, found: list[str], key: str = "") -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _collect_secrets(inner, found, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _collect_secrets(inner, found, key)
    elif isinstance(value, str) and len(value) >= 4 and key not in HARMLESS_OPTIONS:
        found.append(value)
