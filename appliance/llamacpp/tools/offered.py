"""The tools of one request, checked: what may be called, with which arguments, and whether something must be."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.json_types import JsonObject, JsonSchema
from appliance.errors import RequestError, Unsupported

MAX_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NO_PARAMETERS: Final[JsonSchema] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class OfferedTools:
    tools: Sequence[JsonObject]
    """As the caller wrote them; the template shows them to the model."""
    schemas: Mapping[str, JsonSchema]
    """Of the arguments of each tool that may be called, by name."""
    strict: frozenset[str]
    """Tools whose schema the caller wants kept to the letter."""
    required: bool
    parallel: bool
    """Several calls in one reply. A tool that is asked for by name is called once."""


def check_offered_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> OfferedTools | None:
    """None where the model may call nothing. Raises RequestError or Unsupported, naming the field."""
    if not tools:
        if choice == "required" or isinstance(choice, Mapping):
            raise RequestError("tool_choice: asks for a call and there are no tools; give tools", param="tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: {len(tools)} are more than {MAX_TOOLS}; offer fewer", param="tools")
    schemas: dict[str, JsonSchema] = {}
    strict: set[str] = set()
    for index, tool in enumerate(tools):
        name, function = _function(f"tools[{index}]", tool)
        if name in schemas:
            raise RequestError(f"tools[{index}]: a second tool is called {name!r}; rename one", param="tools")
        schemas[name] = _arguments_schema(f"tools[{index}].function.parameters", function.get("parameters"))
        if function.get("strict"):
            strict.add(name)
    if choice == "none":
        return None
    names, required = _chosen(choice, schemas)
    one = isinstance(choice, Mapping) and choice.get("type") == "function"
    return OfferedTools(
        tools=tools,
        schemas={name: schemas[name] for name in names},
        strict=frozenset(strict),
        required=required,
        parallel=parallel is not False and not one,
    )


def _function(place: str, tool: Any) -> tuple[str, JsonObject]:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if kind not in ("function", None):
        raise Unsupported(f"{place}.type: {kind!r:.40} is not supported by local models; use function", param=place)
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{place}.function.name: {name!r:.80} is no name of 1 to 128 letters, digits, _, - or .",
            param=f"{place}.function.name",
        )
    return name, function


def _arguments_schema(place: str, given: Any) -> JsonSchema:
    """The schema of the arguments as an object; arguments that were not declared are of no use."""
    if given is None or given == {}:
        return _NO_PARAMETERS
    if not isinstance(given, Mapping) or given.get("type", "object") != "object":
        raise RequestError(f"{place}: must be a JSON schema of type object, got {given!r:.80}", param=place)
    schema = {"type": "object", **given}
    if schema.get("properties"):
        schema.setdefault("additionalProperties", False)
    return schema


def _chosen(choice: Any, known: JsonObject) -> tuple[Sequence[str], bool]:
    if choice is None or choice in ("auto", "required"):
        return list(known), choice == "required"
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        names, required = [_named(choice)], True
    elif kind == "allowed_tools" and isinstance(allowed := choice.get("allowed_tools"), Mapping):
        rows = allowed.get("tools")
        names = [_named(row) for row in rows] if isinstance(rows, list) else []
        required = allowed.get("mode") == "required"
    else:
        raise RequestError(
            f"tool_choice: {choice!r:.80} is not known; use none, auto, required or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None or not names:
        raise RequestError(f"tool_choice: {unknown!r:.80} is not among the tools; offer it", param="tool_choice")
    return list(dict.fromkeys(names)), required


def _named(row: Any) -> str:
    function = row.get("function") if isinstance(row, Mapping) else None
    return str(function.get("name")) if isinstance(function, Mapping) else ""
