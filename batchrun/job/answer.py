"""The section `answer` of a job file: the form of answers, and the columns beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from batchrun.errors import JobError
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
    choices: list[str] | None = Field(None, min_length=1, description="texts of which an answer is one")
    probabilities: bool = Field(
        False,
        description="the probability of each of the choices as a column, a struct with a field for each; nothing is "
        "generated, the answer is the likeliest choice",
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
        description="log probabilities as columns: of each token of the answer, their mean, and those of so many "
        "likeliest tokens in its place; 0 is without the latter",
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

    @field_validator("choices", mode="before")
    @classmethod
    def _same_for_all_rows(cls, choices: Any) -> Any:
        if isinstance(choices, dict):
            raise ValueError(
                "choices are the same for all rows: list all labels, and name a row's own in its prompt"
            )
        return choices

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[str] | None) -> list[str] | None:
        if choices is not None and ("" in choices or len(set(choices)) < len(choices)):
            raise ValueError("give texts that are not empty, each once")
        return choices

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(form is not None for form in (self.schema_, self.regex, self.choices)) > 1:
            raise ValueError("give only one of schema, regex, choices")
        if self.is_constrained and self.reasoning is not None:
            raise ValueError(
                "reasoning cannot come before an answer of schema, regex or choices: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.probabilities and self.choices is None:
            raise ValueError("probabilities are of choices: give answer.choices")
        if self.raw is not None and (self.probabilities or not self.is_constrained):
            raise ValueError(
                "raw is the text that a schema, regex or choices are read from: leave it out here"
            )
        if self.score is not None and self.is_constrained:
            raise ValueError("score takes texts from a column: leave out schema, regex and choices")
        generates_nothing = (
            "score" if self.score is not None else "probabilities" if self.probabilities else ""
        )
        for name in ("logprobs", "reasoning"):
            if generates_nothing and getattr(self, name) is not None:
                raise ValueError(f"{name} are of generated tokens, and {generates_nothing} generates none")
        if self.choices is not None and self.probabilities:
            folded = [choice.casefold() for choice in self.choices]
            if len(set(folded)) < len(folded):
                raise ValueError("probabilities are columns by choice: choices may not differ in case alone")
        return self

    @property
    def is_scored(self) -> bool:
        """Whether nothing is generated, and given texts are scored instead."""
        return self.probabilities or self.score is not None

    @property
    def read_columns(self) -> list[str]:
        """Columns of the input that are read for it."""
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
        from batchrun.structured.answer_format import (  # pyarrow: not for every job
            answer_format,
            number_format,
        )

        if self.score is not None:
            return number_format()
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
