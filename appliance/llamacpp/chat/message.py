"""A chat message as a caller sends it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from appliance.core.json_types import MutableJsonObject


class MessageIn(BaseModel):
    """Other fields (name, tool_calls, tool_call_id, ...) travel on to the template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[MutableJsonObject] | None = None
