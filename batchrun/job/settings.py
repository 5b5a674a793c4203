"""The sections of a job file, all but the prompt: every key with its type, its bounds, its default and what it does."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from batchrun.job.durations import parse_deadline

# A scheduler's address, whatever comm library has its protocol; http:// is that of its dashboard.
_ADDRESS = re.compile(r"(?!https?://)(\w+://)?[^\s/]+:\d+(/.*)?|inproc://.+")
# Dask's form of a size: 16GiB, 4e9, or a share of the machine's memory such as 0.5.
_SIZE = re.compile(r"auto|\d*\.?\d+(e\d+)? ?([kmgtp]i?)?b?", re.IGNORECASE)


def _kinds_of(annotation: Any) -> list[Any]:
    """The plain types that a key's type is made of."""
    inner = get_args(annotation)
    return [kind for one in inner for kind in _kinds_of(one)] if inner else [annotation]


class Settings(BaseModel):
    """A section of the job file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any, key: ValidationInfo) -> Any:
        """pydantic takes true for 1, and `logprobs: true` is hardly meant as `logprobs: 1`."""
        if isinstance(given, bool):
            kinds = set(_kinds_of(cls.model_fields[str(key.field_name)].annotation))
            if bool not in kinds and kinds & {int, float}:
                raise PydanticKnownError("int_type" if int in kinds else "float_type")
        return given


class InputSettings(Settings):
    """Which rows the job reads."""

    path: str | list[str] = Field(
        description="a file, folder, glob, or a list of them, on any fsspec URL; "
        "folders below it named key=value give columns"
    )
    columns: list[str] | None = Field(None, description="columns carried into the output; all by default")
    filters: list[Any] | None = Field(
        None, description="rows to keep, in pyarrow's form: [[column, op, value], ...]"
    )
    limit: int | None = Field(None, ge=1, description="only the first N rows")
    order: Literal["prefix"] | None = Field(
        None,
        description="prefix: rows whose prompts begin alike go into the same partitions, which then are read from "
        "many places; by default rows stay in the input's order",
    )
    since: Literal["last"] | None = Field(
        None, description="last: only files that no earlier run into this output took"
    )
    cast: dict[str, str] = Field(default_factory=dict, description="column: type, where files differ")
    allow_empty: bool = Field(
        True, description="whether an input without any row may run; it is warned about"
    )
    skip_bad_files: bool = Field(False, description="leave unreadable files out, recorded in the plan")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="fsspec's options for the input; never written anywhere"
    )

    @property
    def paths(self) -> list[str]:
        """`path` as a list, whatever it was written as."""
        return [self.path] if isinstance(self.path, str) else self.path

    @field_validator("path", mode="before")
    @classmethod
    def _some_paths(cls, path: Any) -> Any:
        paths = path if isinstance(path, list) else [path]
        if not paths or not all(isinstance(one, str) and one for one in paths):
            raise ValueError("give a path, in quotes, or a list with at least one")
        return path

    @model_validator(mode="after")
    def _no_limit_on_growth(self) -> Self:
        if self.since is not None and self.limit is not None:
            raise ValueError("limit leaves rows of taken files out for ever; use it without since")
        return self


class ModelSettings(Settings):
    """Which model, and what may be done to load it."""

    name: str = Field(min_length=1, description="hub id, local folder, or fsspec URL of a folder")
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    tokenizer: str | None = Field(
        None, min_length=1, description="a tokenizer from elsewhere; the model's own by default"
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="a LoRA adapter as peft saves it, merged into the weights while they are loaded: a hub id, local "
        "folder, or fsspec URL of a folder",
    )
    adapters: dict[str, str] | None = Field(
        None,
        description="LoRA adapters by names of yours, of which each row has the one that adapter_column names",
    )
    adapter_column: str | None = Field(
        None,
        description="a column with the name of each row's adapter; null is the model without one, another name than "
        "those of adapters the row's error INVALID_SETTING",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto is float32 on a CPU, half precision on a GPU"
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8 converts the weights while loading, and activations token by token: about half the memory "
        "and time of products, for answers that differ a little; needs a GPU with fp8 (Ada, Hopper and newer)",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(False, description="load weights from pickle files, which can run code")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="fsspec's options for the model; never written anywhere"
    )

    @model_validator(mode="after")
    def _adapters_of_rows(self) -> Self:
        if (self.adapters is None) != (self.adapter_column is None):
            raise ValueError("adapters and adapter_column go together: give both, or adapter for all rows")
        if self.adapters is not None and not self.adapters:
            raise ValueError("adapters: give at least one, as name: folder")
        if self.adapters is not None and self.adapter is not None:
            raise ValueError("give adapter for all rows, or adapters and adapter_column")
        if self.adapters is not None and self.quantization is not None:
            raise ValueError("quantization goes with adapter, and not with adapters of rows: leave one out")
        return self

    @property
    def places(self) -> list[str]:
        """Where its files are: hub ids, paths and URLs."""
        places = (self.name, self.tokenizer, self.adapter, *(self.adapters or {}).values())
        return [place for place in places if place is not None]

    @property
    def title(self) -> str:
        """What a person calls it: a hub id as it is, of a path its last part."""
        hub_id = self.name.count("/") == 1 and self.name[0] not in "/."
        return self.name if hub_id else PurePath(self.name).name


class EngineSettings(Settings):
    """Which engine, and its budgets; but for `cache_dtype`, none of them decides an answer."""

    kind: str = Field("auto", description="auto, padded, paged, or module:Class of an engine of your own")
    gpus: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="paged: GPUs that share one engine (tensor parallel size); auto is the smallest power of two at "
        "which the weights and the keys and values of 64 rows fit",
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="padded: prompt + new tokens of one batch, padding included"
    )
    window_rows: int = Field(8192, ge=1, description="rows looked ahead at, and ordered by length together")
    max_rows: int | None = Field(None, ge=1, description="paged: rows that decode at once; 2048 on a GPU")
    prefill_tokens: int | None = Field(None, ge=1, description="paged: prompt tokens computed at once")
    decode_steps: int = Field(8, ge=1, le=64, description="paged: steps between two looks at the results")
    memory_fraction: float = Field(0.9, gt=0, lt=1, description="paged: share of the GPU's memory to use")
    cache_tokens: int | None = Field(
        None, ge=1, description="paged: at most this many tokens of keys and values"
    )
    cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="paged: of keys and values; auto is the model's, fp8 takes half the memory, for answers that "
        "differ a little, so that it is part of the job's identity; needs a GPU with fp8 (Ada, Hopper and newer)",
    )
    compile: bool = Field(True, description="paged: torch.compile for the model on a GPU")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in ("auto", "padded", "paged") and not re.fullmatch(r"[\w.]+:\w+", kind):
            raise ValueError("use auto, padded, paged, or module:Class")
        return kind

    @field_validator("gpus", mode="before")
    @classmethod
    def _some_gpus(cls, gpus: Any) -> Any:
        if gpus != "auto" and (type(gpus) is not int or gpus < 1):
            raise ValueError("give a number of GPUs, 1 or more, or auto")
        return gpus

    @model_validator(mode="after")
    def _paged_on_several_gpus(self) -> Self:
        if self.kind == "padded" and self.gpus not in (1, "auto"):
            raise ValueError("the padded engine runs on one GPU: leave gpus out, or use kind: paged")
        return self

    @model_validator(mode="after")
    def _fp8_in_pages(self) -> Self:
        if self.kind == "padded" and self.cache_dtype != "auto":
            raise ValueError("only the paged engine keeps keys and values in fp8; leave cache_dtype out")
        return self


class TlsSettings(Settings):
    """The certificates of a scheduler at a tls:// address."""

    ca: str = Field(description="PEM file of the authority that signed the scheduler's certificate")
    cert: str = Field(description="PEM file of this client's certificate")
    key: str = Field(description="PEM file of its key")


class ClusterSettings(Settings):
    """Where the job runs: on this machine unless address, slurm or kubernetes says otherwise."""

    address: str | None = Field(None, description="of a running Dask scheduler; a local cluster by default")
    tls: TlsSettings | None = Field(
        None, description="for a tls:// address; Dask's own configuration by default"
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="how many; by default one for each engine.gpus GPUs of this machine, or one",
    )
    slots: int = Field(2, ge=1, description="partitions at once on a worker")
    memory_limit: str = Field("auto", description="of one local worker, in Dask's form")
    price_per_gpu_hour: float | None = Field(
        None,
        ge=0,
        description="what an hour of one GPU costs, in any currency; a worker has engine.gpus of them",
    )
    metrics_port: int | str | None = Field(
        None,
        description="where the driver serves Prometheus metrics of the run and all workers: a port of the loopback "
        "interface, or ADDRESS:PORT, such as 0.0.0.0:9090 for every interface",
    )
    slurm: dict[str, Any] | None = Field(
        None, repr=False, description="workers as Slurm jobs: options of dask-jobqueue's SLURMCluster"
    )
    kubernetes: dict[str, Any] | None = Field(
        None, repr=False, description="workers as pods: image, name, namespace, resources, env, pod"
    )

    @property
    def is_local(self) -> bool:
        """Whether workers run on this machine, started by the run itself."""
        return self.address is None and self.slurm is None and self.kubernetes is None

    @field_validator("address")
    @classmethod
    def _an_address(cls, address: str | None) -> str | None:
        if address is not None and not _ADDRESS.fullmatch(address):
            raise ValueError("give a scheduler's address, such as tcp://HOST:8786")
        return address

    @field_validator("memory_limit")
    @classmethod
    def _a_size(cls, size: str) -> str:
        if not _SIZE.fullmatch(size):
            raise ValueError("give a size such as 16GiB, or auto")
        return size

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _a_port(cls, port: Any) -> Any:
        number = str(port).rpartition(":")[2]
        if port is not None and not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
            raise ValueError("give a port from 1 to 65535, or ADDRESS:PORT")
        return port

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.address, self.slurm, self.kubernetes)) > 1:
            raise ValueError("give at most one of address, slurm, kubernetes")
        return self

    @model_validator(mode="after")
    def _tls_where_it_is_used(self) -> Self:
        if self.tls is not None and not (self.address or "").startswith("tls://"):
            raise ValueError("tls is for an address that starts with tls://")
        return self


class NotifySettings(Settings):
    """Who is told that a run has ended."""

    url: str = Field(
        repr=False,
        description="a webhook: gets one POST of JSON when a run ends, however it ends; never shown",
    )
    format: Literal["json", "slack"] | None = Field(
        None,
        description="json, or slack for a message that Slack shows; slack for hooks.slack.com by default",
    )

    @field_validator("url")
    @classmethod
    def _over_http(cls, url: str) -> str:
        if not url.startswith(("https://", "http://")):
            raise ValueError("give an https:// or http:// address")
        return url

    @property
    def for_slack(self) -> bool:
        """Whether the message is one for Slack."""
        return self.format == "slack" or (self.format is None and "://hooks.slack.com/" in self.url)


class LimitSettings(Settings):
    """What stops a run. What was finished by then is kept."""

    max_error_rate: float = Field(0.2, ge=0, le=1, description="share of failed rows that stops the job")
    error_sample: int = Field(1000, ge=1, description="rows seen before that share counts")
    stall_seconds: float = Field(
        900, gt=0, description="without any progress of a partition before its worker is restarted"
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description="stop, resumable, once all runs of this output together have cost this much: GPU hours times "
        "cluster.price_per_gpu_hour",
    )
    deadline: str | None = Field(
        None,
        description="stop, resumable, at this time: ISO 8601 (local without an offset), or a duration from the "
        "start of the run such as 6h or 1h30m",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="stop, resumable, once this many rows of the output are done; a few more may be by then",
    )

    @field_validator("deadline", mode="before")
    @classmethod
    def _a_time(cls, deadline: Any) -> Any:
        if deadline is not None:
            parse_deadline(str(deadline), datetime.now().astimezone())
        return deadline
