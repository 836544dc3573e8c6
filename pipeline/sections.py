"""What all sections of params.yaml have in common. No torch here, so that params are read at once."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")


class StrictModel(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"names {value} twice")
    return values


Unique = Annotated[tuple[T, ...], AfterValidator(_no_repeats)]
"""Values, none twice."""

NonEmptyUnique = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_no_repeats)]
"""At least one value, none twice."""
