"""The section `answer` of a job file: the form of answers, and the columns beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, Tag, field_validator, model_validator

from batchrun.errors import JobError
from batchrun.job.generation import COLUMN, VALUE, VALUE_OR_COLUMN
from batchrun.job.settings import Settings

if TYPE_CHECKING:
    from batchrun.structured.answer_format import AnswerFormat


ASKED_COLUMNS = (
    "logprobs",
    "top_logprobs",
    "mean_logprob",
    "reasoning",
    "reasoning_tokens",
    "raw",
    "probabilities",
    "perplexity",
    "scored_tokens",
)
"""Columns that an output has if its job asks for them: see `AnswerSettings.columns`."""


def _distinct(choices: list[str]) -> list[str]:
    if "" in choices or len(set(choices)) < len(choices):
        raise ValueError("give texts that are not empty, each once")
    return choices


Choices = Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]


class ChoicesFromColumn(Settings):
    """`choices` of each row: nothing is generated, the likeliest of them is the answer."""

    column: str = Field(
        min_length=1,
        description="a column with each row's own, a list of texts; another value that does not fit, null too, is the "
        "row's error INVALID_SETTING",
    )


class AnswerSettings(Settings):
    """What an answer has to be (free text by default), what is taken out of it, and what is written beside it."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: dict[str, Any] | str | None = Field(
        None,
        alias="schema",
        description="JSON Schema of the answers: a mapping, a JSON or YAML file, or module:Class of a pydantic model; "
        "the answer column has its type. Only declared properties are generated",
    )
    regex: str | None = Field(
        None, min_length=1, description="regular expression that a whole answer matches; no look-around"
    )
    choices: (
        Annotated[Annotated[Choices, Tag(VALUE)] | Annotated[ChoicesFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN]
        | None
    ) = Field(None, description="texts of which an answer is one, the likeliest where they are a column's")
    probabilities: bool = Field(
        False,
        description="the probability of each of the choices as a column, a struct with a field for each, or a list in "
        "the order of a row's own; nothing is generated, the answer is the likeliest choice",
    )
    raw: str | None = Field(
        None,
        min_length=1,
        description="a column for the text of an answer as the model wrote it, beside the typed one; invalid ones too",
    )
    score: str | None = Field(
        None,
        min_length=1,
        description="a column with texts: nothing is generated, the answer is the log probability of the row's text "
        "behind its prompt; NAME_mean_logprob, NAME_perplexity and NAME_tokens stand beside it",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=100,
        description="log probabilities as columns: of each token of the answer, their mean, and those of the N "
        "likeliest tokens in its place; 0 leaves those out",
    )
    reasoning: str | None = Field(
        None,
        min_length=1,
        description="a column for what a reasoning model thinks before it answers; answer is then the rest, and null "
        "where it was cut before that. The column NAME_tokens counts its tokens, which output_tokens includes",
    )
    reasoning_markers: list[str] | None = Field(
        None,
        description="the texts around the reasoning, such as [<think>, </think>]; by default as the tokenizer and the "
        "chat template have them",
    )

    @field_validator("schema_", mode="before")
    @classmethod
    def _a_schema_or_its_name(cls, schema: Any) -> Any:
        if not isinstance(schema, dict | None) and not (isinstance(schema, str) and schema):
            raise ValueError("give a JSON Schema as a mapping, a file with one, or module:Class")
        return schema

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(form is not None for form in (self.schema_, self.regex, self.choices)) > 1:
            raise ValueError("give only one of schema, regex, choices")
        return self

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.probabilities and self.choices is None:
            raise ValueError("probabilities are of choices: give answer.choices")
        if self.raw is not None and (self.is_scored or not self.is_constrained):
            raise ValueError(
                "raw is the text that a schema, regex or choices are read from: leave it out here"
            )
        if self.score is not None and self.is_constrained:
            raise ValueError("score takes texts from a column: leave out schema, regex and choices")
        for name in ("logprobs", "reasoning"):
            if self.is_scored and getattr(self, name) is not None:
                raise ValueError(f"{name} are of generated tokens, and {self.scored_by} generates none")
        if isinstance(self.choices, list) and self.probabilities:
            folded = [choice.casefold() for choice in self.choices]
            if len(set(folded)) < len(folded):
                raise ValueError("probabilities are columns by choice: choices may not differ in case alone")
        return self

    @property
    def is_scored(self) -> bool:
        """Whether nothing is generated, and given texts are scored instead."""
        return bool(self.scored_by)

    @property
    def scored_by(self) -> str:
        """What asks for that; empty where nothing does."""
        if self.score is not None:
            return "score"
        if self.probabilities:
            return "probabilities"
        return "choices of a column" if isinstance(self.choices, ChoicesFromColumn) else ""

    @property
    def read_columns(self) -> list[str]:
        """Columns of the input that are read for it."""
        if isinstance(self.choices, ChoicesFromColumn):
            return [self.choices.column]
        return [] if self.score is None else [self.score]

    @property
    def is_constrained(self) -> bool:
        """Whether answers are kept to a form."""
        return any(form is not None for form in (self.schema_, self.regex, self.choices))

    @property
    def format(self) -> AnswerFormat | None:
        """What answers are kept to; None for free text.

        Raises:
            JobError: a keyword or an expression that is not supported, or a schema that was not read from its file.
        """
        if isinstance(self.schema_, str):
            raise JobError(
                "the schema was not read", "answer.schema", "give it as a mapping, or use Job.load"
            )
        # pyarrow: not for every job.
        from batchrun.structured.answer_format import (
            answer_format,
            number_format,
            text_format,
        )

        if self.score is not None:
            return number_format()
        if isinstance(self.choices, ChoicesFromColumn):
            return text_format(self.probabilities)
        return answer_format(self.schema_, self.regex, self.choices, self.probabilities)

    @property
    def columns(self) -> dict[str, str | None]:
        """Those of ASKED_COLUMNS that are asked for, with their names where the job gives them here."""
        found: dict[str, str | None] = {}
        if self.logprobs is not None:
            found |= {"logprobs": None, "mean_logprob": None}
            found |= {"top_logprobs": None} if self.logprobs else {}
        if self.reasoning is not None:
            found |= {"reasoning": self.reasoning, "reasoning_tokens": f"{self.reasoning}_tokens"}
        if self.raw is not None:
            found["raw"] = self.raw
        if self.probabilities:
            found["probabilities"] = None
        if self.score is not None:
            names = {"mean_logprob": "mean_logprob", "perplexity": "perplexity", "scored_tokens": "tokens"}
            found |= {name: f"{self.score}_{suffix}" for name, suffix in names.items()}
        return found

    @model_validator(mode="after")
    def _two_markers_of_a_column(self) -> Self:
        if self.reasoning_markers is None:
            return self
        if len(self.reasoning_markers) != 2 or not all(marker.strip() for marker in self.reasoning_markers):
            raise ValueError("reasoning_markers are two texts: [opening, closing]")
        if self.reasoning is None:
            raise ValueError(
                "reasoning_markers are of no use without reasoning: name a column for the reasoning"
            )
        return self
