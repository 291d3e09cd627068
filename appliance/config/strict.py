"""What every table is made of: strictness, and the kinds of value that several of them hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from appliance.core import Residency

PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]
Usd = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Quality = Annotated[float, Field(ge=0, le=1)]


def check_residency(text: str) -> str:
    return str(Residency.parse(text))


class StrictModel(BaseModel):
    """Unknown fields, wrong types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
