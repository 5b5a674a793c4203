"""The job file: a typed model, its validation, and the hash of what decides the outputs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from batchrun.errors import JobError
from batchrun.job.answer import ASKED_COLUMNS, AnswerSettings
from batchrun.job.answer_schema import load_schema
from batchrun.job.explain import explain, keys_of
from batchrun.job.generation import GenerationSettings
from batchrun.job.output import SAMPLE, OutputSettings
from batchrun.job.prompt import PromptSettings
from batchrun.job.settings import (
    ClusterSettings,
    EngineSettings,
    InputSettings,
    LimitSettings,
    ModelSettings,
    NotifySettings,
    Settings,
    TlsSettings,
)
from batchrun.job.written import as_written, environment, secrets, unexpanded
from batchrun.job.yaml_text import parse_yaml
from batchrun.storage.protocols import refuse_unknown

# A password before the host, or a signed URL's query: what a plan, a log or a message would carry on.
_SECRET_IN_URL = re.compile(
    r"://[^/@\s]*:[^/@\s]*@|://.*[?&]([\w-]*(signature|token|credential|secret|password|key)|sig)=",
    re.IGNORECASE,
)


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
    answer: AnswerSettings = Field(
        AnswerSettings(),
        description="what an answer has to be (at most one of schema, regex, choices), what is taken out of it, and "
        "what is written beside it",
    )
    engine: EngineSettings = Field(
        EngineSettings(),
        description="what runs the model, and its budgets; but for cache_dtype, decides no answer",
    )
    output: OutputSettings = Field(description="where the answers go, and how they are cut and staged")
    cluster: ClusterSettings = Field(ClusterSettings(), description="what it runs on")
    limits: LimitSettings = Field(LimitSettings(), description="when a run stops by itself")
    notify: NotifySettings | None = Field(None, description="who is told that a run has ended")

    _file: Path | None = PrivateAttr(None)

    @property
    def title(self) -> str:
        """What a person calls it: the job file's name, or its folder's where it is just job.yaml, or the output's."""
        if self._file is None:
            return PurePath(self.output.path).name or self.output.path
        return (
            self._file.parent.name if self._file.stem == "job" and self._file.parent.name else self._file.stem
        )

    # The job file's own values, before ${NAME} was filled in; None for a job that was built in Python.
    _written: dict[str, Any] | None = PrivateAttr(None)
    _environment: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _asked_columns(self) -> Self:
        """Columns that are asked for get their names, so that whoever has the output's settings knows of them."""
        output, asked = self.output, self.answer.columns
        for name in ASKED_COLUMNS:
            if name in output.columns and name not in asked:
                raise ValueError(f"output.columns: {name} is written where the answer section asks for it")
        if output.samples == "rows":
            asked[SAMPLE] = SAMPLE
        elif SAMPLE in output.columns:
            raise ValueError(f"output.columns: {SAMPLE} is written with output.samples: rows")
        answer = output.column("answer")
        named = {name: own or f"{answer}_{name}" for name, own in asked.items()} | output.columns
        if named != output.columns:
            self.__dict__["output"] = output.model_copy(update={"columns": named})
        return self

    @model_validator(mode="after")
    def _samples_of_row(self) -> Self:
        """Whoever has the output's settings knows how many answers a row has, in lists or in rows."""
        if self.generation.samples > 1 and self.answer.is_scored:
            what = f"answer.{self.answer.scored_by} generates none"
            raise ValueError(f"generation.samples are of generated answers, and {what}")
        if self.output.samples == "rows" and self.generation.samples == 1:
            raise ValueError(
                "output.samples: rows is for several samples: set generation.samples, or leave it out"
            )
        if self.generation.samples != self.output.samples_of_row * self.output.rows_of_row:
            self.__dict__["output"] = self.output.of_samples(self.generation.samples)
        return self

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.limits.max_cost is not None and not self.cluster.price_per_gpu_hour:
            raise ValueError("limits.max_cost needs cluster.price_per_gpu_hour")
        return self

    @model_validator(mode="after")
    def _ends_by_itself(self) -> Self:
        if self.generation.stop and self.answer.is_constrained:
            raise ValueError(
                "generation.stop would cut answers: leave it out beside answer.schema, regex or choices"
            )
        return self

    @model_validator(mode="after")
    def _likeliest(self) -> Self:
        if self.generation.temperature and self.answer.is_scored and self.answer.choices is not None:
            raise ValueError(
                f"answer.{self.answer.scored_by} takes the likeliest choice: leave generation.temperature at 0"
            )
        return self

    @model_validator(mode="after")
    def _no_secret_in_a_url(self) -> Self:
        places = {"input.path": self.input.paths, "output.path": [self.output.path]}
        places["model"] = list(self.model.places)
        for name, urls in places.items():
            if any(_SECRET_IN_URL.search(url) for url in urls):
                raise ValueError(
                    f"{name} has a password or signature in its URL; put it into storage_options"
                )
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
        except OSError as error:
            what = f"cannot read the job file ({error.strerror})"
            raise JobError(what, str(path), "give the path of a YAML file") from None
        except UnicodeDecodeError:
            what = "cannot read the job file (it is not UTF-8 text)"
            raise JobError(what, str(path), "give a YAML file, saved as UTF-8") from None
        job = cls.parse(text, overrides, where=str(path), base=path.resolve().parent)
        job._file = path.resolve()
        for url in (*job.input.paths, job.output.path, *job.model.places):
            refuse_unknown(url, JobError)
        return job

    @classmethod
    def parse(
        cls, text: str, overrides: Sequence[str] = (), where: str = "job", base: Path | None = None
    ) -> Job:
        """The same from YAML text; `base` is the folder that relative paths start from. Raises JobError likewise."""
        tree = parse_yaml(text, where)
        if not isinstance(tree, dict):
            raise JobError(
                "a job file is a mapping of sections", where, f"start with {', '.join(cls.model_fields)}"
            )
        for override in overrides:
            _apply(tree, override)
        try:
            job = cls.model_validate(_expand(tree, where))
        except ValidationError as error:
            faults = (unexpanded(explain(e, cls), tree, keys_of(e)) for e in error.errors())
            raise JobError("; ".join(faults), where) from None
        job._written, job._environment = tree, environment(tree)
        return job if base is None else job._resolve(base)

    def _resolve(self, base: Path) -> Job:
        paths = [_absolute(p, base) for p in self.input.paths]
        model: dict[str, Any] = {
            name: str(base / place)
            for name in ("name", "tokenizer", "adapter")
            if (place := getattr(self.model, name)) is not None and (base / place).is_dir()
        }
        if self.model.adapters is not None:
            places = self.model.adapters.items()
            model["adapters"] = {n: str(base / p) if (base / p).is_dir() else p for n, p in places}
        answer = self.answer
        if isinstance(answer.schema_, str):
            answer = answer.model_copy(update={"schema_": load_schema(answer.schema_, base)})
        cluster = self.cluster
        if cluster.tls is not None:
            files = {name: _absolute(path, base) for name, path in cluster.tls}
            cluster = cluster.model_copy(update={"tls": TlsSettings(**files)})
        return self.model_copy(
            update={
                "answer": answer,
                "cluster": cluster,
                "input": self.input.model_copy(update={"path": paths if len(paths) > 1 else paths[0]}),
                "model": self.model.model_copy(update=model),
                "output": self.output.model_copy(update={"path": _absolute(self.output.path, base)}),
            }
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the outputs, as plain JSON values: no place, no budget, no secret.

        The model stands in it by name and revision; what its folder holds is pinned beside it by the caller.
        """
        prompt = self.prompt.model_dump(mode="json")
        if prompt["special_tokens"] == "parse":
            # As it was before there was a choice: older outputs can go on.
            del prompt["special_tokens"]
        # What an older job could not have is only there where it is set: its outputs keep their identity.
        if not prompt["template_kwargs"]:
            del prompt["template_kwargs"]
        if prompt["tools"] is None:
            del prompt["tools"]
        elif isinstance(prompt["tools"], list):
            # As text, since templates write the keys of tools in their order.
            prompt["tools"] = json.dumps(prompt["tools"])
        if self.prompt.messages and self.prompt.messages[-1].role == "assistant":
            prompt["continue_final_message"] = True
        output = {"columns", "rows_per_part", "bytes_per_part", "compression"}
        if self.output.partition_by:
            output.add("partition_by")
        model = {"revision", "dtype"}
        if self.model.quantization is not None:
            model.add("quantization")
        if self.model.adapter_column is not None:
            model.add("adapter_column")
        # The only key of the engine that decides answers.
        in_fp8 = self.engine.cache_dtype != "auto"
        engine = {"cache_dtype": self.engine.cache_dtype} if in_fp8 else None
        if self.output.row_column is not None:
            # Only where it is set: outputs from before it was there keep their identity.
            output.add("row_column")
        read = {"columns", "filters", "limit", "cast"}
        if self.input.order is not None:
            read.add("order")
        generation = self.generation.model_dump(mode="json", exclude={"deduplicate"})
        if self.generation.deduplicate and self.generation.temperature != 0:
            # Where nothing is sampled, it decides nothing.
            generation["deduplicate"] = True
        if self.generation.samples == 1:
            del generation["samples"]
        else:
            output.add("samples")
        # Like them, only where something is asked for.
        answer = self.answer.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {
            **({"answer": answer} if answer else {}),
            "input": self.input.model_dump(mode="json", include=read),
            "prompt": prompt,
            "model": self.model.model_dump(mode="json", include=model),
            **({"engine": engine} if engine else {}),
            "generation": generation,
            "output": self.output.model_dump(mode="json", include=output),
        }

    @property
    def fp8(self) -> str | None:
        """What of the model's work is in fp8 because the job says so, for people; None where nothing is."""
        weights, cache = self.model.quantization is not None, self.engine.cache_dtype == "fp8"
        if weights and cache:
            return "fp8 weights, keys and values"
        return "fp8" if weights else "fp8 keys and values" if cache else None

    def as_written(self, values: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole job, or the sections of it in `values`, as plain JSON values that may be stored and shown.

        Where the job file has `${NAME}`, so have these. Storage options are left out.
        """
        if values is None:
            values = {
                name: section.model_dump(mode="json", by_alias=True, exclude={"storage_options"})
                for name, section in self
                if name != "notify"
            }
        written: dict[str, Any] = as_written(values, self._written)
        return written

    def secrets(self) -> list[str]:
        """Every text in the job that must not be shown anywhere, see `batchrun.job.written.secrets`."""
        found: list[str] = secrets(self.model_dump(), self._written, self._environment)
        return found if self.notify is None else [*found, self.notify.url]


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise JobError(f"{override!r} is not an override", "--set", "write --set key.path=value")
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    try:
        tree[keys[-1]] = parse_yaml(text, f"--set {path}")
    except JobError:
        # A template's braces are no YAML; a shell already quotes, so the text is meant.
        tree[keys[-1]] = text


# ${NAME}, or ${NAME:-default} as in a shell, where an empty variable counts as not set.
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match.groups()
        if default is not None:
            return os.environ.get(name) or default
        if name not in os.environ:
            raise JobError(
                f"environment variable {name} is not set",
                where,
                f"export {name}=..., or write ${{{name}:-default}}",
            )
        return os.environ[name]

    return _VARIABLE.sub(lookup, value)


def _absolute(path: str, base: Path) -> str:
    """A local path made absolute from `base`; a URL as it is."""
    if "://" in path or "::" in path:
        return path
    if match := re.match(r"(\w{2,}):/+(.*)", path):
        raise JobError("a URL has two slashes", path, f"write {match[1]}://{match[2]}")
    return os.path.normpath(base / Path(path).expanduser())
