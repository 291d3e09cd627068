"""The chat that all dialects meet in: OpenAI's chat completions as typed dictionaries, with a few fields more.

Inbound readers make a `ChatBody`; outbound readers make a `ChatCompletion` or a stream of `ChatChunk`. Nothing here is
validated: bodies are checked where they come in (`tasks/chat`, `strict_fields`), replies where they are read.

Fields beyond OpenAI's own:

| field | on | meaning |
|---|---|---|
| `reasoning_content` | messages, deltas | the text of a model's thinking; never sent back by itself |
| `thinking_blocks` | messages, deltas | what a provider wants back with the next request, unchanged: Anthropic's `thinking` and `redacted_thinking` blocks, `reasoning` items of the Responses API. A dialect sends back its own alone |
| `extra_content.google.thought_signature` | messages, tool calls | the same for Gemini, where Google's OpenAI-compatible endpoint puts it |
| `cache_control` | parts, messages, tool calls, tools | Anthropic's cache hint |
| `is_error` | tool messages | the tool failed |
| `stop_reason` | choices | the stop string that ended the answer |

Cache hints and an image's `detail` are carried over where a dialect has them and left out elsewhere: no answer is wrong
without them. All else that cannot be carried over is refused by name.
"""  # noqa: E501

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias, TypedDict

import orjson

from appliance.core.json_types import JsonObject, JsonSchema
from appliance.errors import RequestError

MAX_MESSAGES: Final = 100_000
MAX_CHOICES: Final = 128
MAX_TOP_LOGPROBS: Final = 20
MAX_STOPS: Final = 16

TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal"})
AUDIO_PARTS: Final = frozenset({"input_audio", "audio", "audio_url"})

REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
EFFORT_TOKENS: Final[Mapping[str, int]] = {
    "minimal": 1_024,
    "low": 2_048,
    "medium": 8_192,
    "high": 24_576,
    "xhigh": 32_768,
    "max": 32_768,
}
"""For models whose thinking is limited by a number of tokens. `high` is the most that every such Gemini takes."""
_LOW_BUDGET_TOKENS: Final = 4_096
_MEDIUM_BUDGET_TOKENS: Final = 16_384
"""A thinking budget up to these counts as low and medium effort: dialects without budgets know words alone."""

SHAPE_ERRORS: Final = (TypeError, AttributeError, KeyError, IndexError, ValueError)
"""What reading something of another shape raises."""

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]


class ImageUrl(TypedDict, total=False):
    url: str
    detail: str


class ContentPart(TypedDict, total=False):
    """One part of a message's content, by `type`: text, image_url, input_audio, file, refusal."""

    type: str
    text: str
    refusal: str
    image_url: ImageUrl
    input_audio: JsonObject
    file: JsonObject
    cache_control: JsonObject
    prompt_cache_breakpoint: object


Content: TypeAlias = str | list[ContentPart] | None


class CalledFunction(TypedDict, total=False):
    name: str
    arguments: str
    """JSON, or a piece of it in a delta."""


class ToolCall(TypedDict, total=False):
    index: int
    """In deltas alone."""
    id: str
    type: str
    function: CalledFunction
    extra_content: JsonObject
    cache_control: JsonObject


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: str
    content: Content
    refusal: str | None
    reasoning_content: str
    reasoning: str
    """Another name that servers have for `reasoning_content`."""
    thinking_blocks: list[JsonObject]
    tool_calls: list[ToolCall]
    extra_content: JsonObject


class ChatMessage(ChatDelta, total=False):
    name: str
    tool_call_id: str
    is_error: bool
    cache_control: JsonObject


class ToolFunction(TypedDict, total=False):
    name: str
    description: str
    parameters: JsonSchema
    strict: bool


class ChatTool(TypedDict, total=False):
    type: str
    function: ToolFunction
    cache_control: JsonObject


class NamedSchema(TypedDict, total=False):
    name: str
    schema: JsonSchema
    strict: bool
    description: str


class ResponseFormat(TypedDict, total=False):
    type: str
    """text, json_object or json_schema."""
    json_schema: NamedSchema


ToolChoice: TypeAlias = str | JsonObject
"""none, auto, required, or {"type": "function", "function": {"name": ...}}."""


class StreamOptions(TypedDict, total=False):
    include_usage: bool


class ChatBody(TypedDict, total=False):
    """A request. Callers of OpenAI's own endpoint may send fields that are not listed here."""

    model: str
    messages: list[ChatMessage]
    stream: bool
    stream_options: StreamOptions
    max_tokens: int
    max_completion_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | list[str]
    logprobs: bool
    top_logprobs: int
    tools: list[ChatTool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    response_format: ResponseFormat
    reasoning_effort: str
    verbosity: str
    user: str
    safety_identifier: str
    prompt_cache_key: str
    prompt_cache_retention: str


class TokenLogprob(TypedDict, total=False):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["TokenLogprob"]


class ChoiceLogprobs(TypedDict, total=False):
    content: list[TokenLogprob]
    refusal: list[TokenLogprob] | None


class ChatChoice(TypedDict, total=False):
    """Of a whole reply (`message`) or of a chunk (`delta`)."""

    index: int
    message: ChatMessage
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: str


class PromptTokenDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class CompletionTokenDetails(TypedDict):
    reasoning_tokens: int


class ChatUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails
    completion_tokens_details: CompletionTokenDetails


class ChatCompletion(TypedDict, total=False):
    """A whole reply."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    service_tier: str


class ChatChunk(TypedDict, total=False):
    """One event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


def join_parts(parts: list[ContentPart]) -> str | list[ContentPart]:
    """A message's content of `parts`; a lone text is written as a string, which every server understands."""
    if len(parts) == 1 and set(parts[0]) == {"type", "text"}:
        return parts[0]["text"]
    return parts


def text_part(text: str) -> ContentPart:
    return {"type": "text", "text": text}


def image_part(address: str, detail: str | None = None) -> ContentPart:
    image: ImageUrl = {"url": address} if detail is None else {"url": address, "detail": detail}
    return {"type": "image_url", "image_url": image}


def function_call(call_id: str, name: str, arguments: JsonObject | str) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json_text(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def json_text(value: object) -> str:
    return orjson.dumps(value).decode()


def function_tool(
    name: str, description: str | None, parameters: JsonSchema | None, *, strict: bool | None = None
) -> ChatTool:
    function: ToolFunction = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def json_format(
    schema: JsonSchema, *, name: str = "answer", strict: bool | None = None, description: str | None = None
) -> ResponseFormat:
    inner: NamedSchema = {"name": name, "schema": schema}
    if strict is not None:
        inner["strict"] = strict
    if description is not None:
        inner["description"] = description
    return {"type": "json_schema", "json_schema": inner}


def check_tool_offered(name: str, tools: Sequence[ChatTool], path: str) -> str:
    """The name itself. Raises RequestError where no tool has it."""
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        given = f"there are {', '.join(names[:20])}" if names else "there are none"
        raise RequestError(f"{path} is {name[:100]!r}, which is not the name of a tool: {given}", param=path)
    return name


def effort_of_budget(tokens: int) -> str:
    """The reasoning effort that a thinking budget of so many tokens comes closest to."""
    if tokens <= _LOW_BUDGET_TOKENS:
        return "low"
    return "medium" if tokens <= _MEDIUM_BUDGET_TOKENS else "high"


def reasoning_text(message: ChatDelta) -> str:
    """The thinking in a message or delta, under either of the names that servers use."""
    text = message.get("reasoning_content") or message.get("reasoning")
    return text if isinstance(text, str) else ""


def thinking_blocks(message: ChatDelta) -> list[JsonObject]:
    """Those of a message or delta, without the index that they have in a delta."""
    blocks = message.get("thinking_blocks")
    return (
        [
            {name: value for name, value in block.items() if name != "index"}
            for block in blocks
            if isinstance(block, Mapping)
        ]
        if isinstance(blocks, list)
        else []
    )


def wants_usage(body: JsonObject) -> bool:
    """Whether a streamed chat was asked to end with its usage."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True
