"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class Section(BaseModel):
    """A frozen group of settings that rejects unknown keys and docstrings its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
