"""Names for JSON that others define: bodies, schemas, provider objects. Our own values are typed."""

from collections.abc import Mapping
from typing import Any, TypeAlias

JsonObject: TypeAlias = Mapping[str, Any]
"""A JSON object whose fields this project does not define, to be read."""

MutableJsonObject: TypeAlias = dict[str, Any]
"""The same while it is being built."""

JsonSchema: TypeAlias = Mapping[str, Any]
"""A JSON Schema as its caller wrote it."""
