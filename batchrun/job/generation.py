"""The section `generation` of a job file: how an answer is generated, for all rows alike or as columns say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from batchrun.job.settings import Settings


def _no_empty_stop(stop: list[str]) -> list[str]:
    if "" in stop:
        raise ValueError("an empty stop text would end every answer at once: leave it out")
    return stop


NewTokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Stop = Annotated[list[str], AfterValidator(_no_empty_stop)]

# The same for all rows, or a mapping that names a column. The tags stand in pydantic's errors.
VALUE, COLUMN = "(value)", "(column)"
VALUE_OR_COLUMN = Discriminator(lambda given: COLUMN if isinstance(given, dict | Settings) else VALUE)


class FromColumn(Settings):
    """A setting that a column gives each row."""

    column: str = Field(
        min_length=1, description="a column with each row's own; null is the default, another value that "
        "does not fit the row's error INVALID_SETTING",
    )  # fmt: skip
    default: Any


class NewTokensFromColumn(FromColumn):
    """`max_new_tokens` of each row."""

    default: NewTokens = Field(256, description="of rows with a null")


class TemperatureFromColumn(FromColumn):
    """`temperature` of each row."""

    default: Temperature = Field(0.0, description="of rows with a null")


class TopPFromColumn(FromColumn):
    """`top_p` of each row."""

    default: TopP = Field(1.0, description="of rows with a null")


class SeedFromColumn(FromColumn):
    """`seed` of each row."""

    default: Seed = Field(0, description="of rows with a null")


class StopFromColumn(FromColumn):
    """`stop` of each row."""

    default: Stop = Field(default_factory=list, description="of rows with a null")


# Those settings that may be a column's.
_FROM_COLUMNS = ("max_new_tokens", "temperature", "top_p", "seed", "stop")


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What a row may have to itself of how its answer is generated. `adapter` counts those of the model from 1, 0 is
    none."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    adapter: int = 0


class GenerationSettings(Settings):
    """How an answer is generated, in transformers' own words. Some settings may be a column's: {column: NAME}."""

    max_new_tokens: Annotated[
        Annotated[NewTokens, Tag(VALUE)] | Annotated[NewTokensFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN
    ] = Field(256, description="an answer is cut there; also what a row's room is for")
    temperature: Annotated[
        Annotated[Temperature, Tag(VALUE)] | Annotated[TemperatureFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN
    ] = Field(0.0, description="0 is greedy")
    top_p: Annotated[
        Annotated[TopP, Tag(VALUE)] | Annotated[TopPFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN
    ] = Field(1.0, description="sample from the likeliest tokens of this share")
    top_k: int = Field(0, ge=0, description="sample from this many of the likeliest tokens; 0 is all")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens below this share of the likeliest")
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1, tokens that were there are less likely"
    )
    stop: Annotated[Annotated[Stop, Tag(VALUE)] | Annotated[StopFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN] = (
        Field(default_factory=list, description="texts that end an answer; not part of it")
    )
    seed: Annotated[Annotated[Seed, Tag(VALUE)] | Annotated[SeedFromColumn, Tag(COLUMN)], VALUE_OR_COLUMN] = (
        Field(0, description="with a row's place and the position it decides the sampling")
    )

    samples: int = Field(
        1, ge=1, description="answers of each row, of one prompt; what comes of several says output.samples"
    )

    deduplicate: bool | None = Field(
        None,
        description="rows with the same prompt are generated once and copied; by default where the answer cannot "
        "differ, with true where it is sampled, too, with false never",
    )

    @model_validator(mode="after")
    def _different_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "samples of a greedy answer are all the same: set generation.temperature, such as 0.7, or samples: 1"
            )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The settings that are a column's, each with its column."""
        given = ((name, getattr(self, name)) for name in _FROM_COLUMNS)
        return {name: value.column for name, value in given if isinstance(value, FromColumn)}

    @property
    def defaults(self) -> RowSettings:
        """What holds for rows without settings of their own."""
        given = ((name, getattr(self, name)) for name in _FROM_COLUMNS)
        values = {name: value.default if isinstance(value, FromColumn) else value for name, value in given}
        return RowSettings(**{**values, "stop": tuple(values["stop"])})
