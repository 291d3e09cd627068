"""Chat completions: the envelope is checked, the body travels on verbatim, whole replies are verified."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import orjson

from appliance.core import (
    Ability,
    CallerBody,
    Endpoint,
    Format,
    LateVerifiedCall,
    ParsedRequest,
    Target,
    UpstreamCall,
    UpstreamReply,
)
from appliance.core.json_types import JsonObject, JsonSchema
from appliance.errors import RequestError, Unsupported
from appliance.tasks.reply_result import ReplyResult
from appliance.wire.chat_fields import is_harmless
from appliance.wire.chat_ir import MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, REASONING_EFFORTS, ChatBody, ChatChoice
from appliance.wire.chat_replies import ChatStreamCheck, check_choices, check_json_choice, check_tool_calls
from appliance.wire.dialect import InboundDialect
from appliance.wire.json_schema import check_schema
from appliance.wire.openai.inbound import check_messages, holds_more_than_text, join_message_text
from appliance.wire.registry import INBOUND
from appliance.wire.strict_fields import (
    missing,
    read_bool,
    read_int,
    read_list,
    read_model,
    read_number,
    read_object,
    read_text,
    show,
    wrong,
)
from appliance.wire.usage import MESSAGE_TOKENS, estimate_tokens

CHAT_ENDPOINTS: frozenset[Endpoint] = frozenset({"chat", *INBOUND})
"""Those whose requests are chats, whatever dialect they came in: their bodies hold OpenAI's `messages`."""

ONLY_ELSEWHERE = ("store", "web_search_options", "moderation", "verbosity", "service_tier")
"""What some providers do besides answering, and no engine of this node does."""

DEFAULT_OUTPUT_TOKENS = 256
"""What admission reckons with where the caller sets no bound: chat answers are seldom longer, and reckoning with the
whole context would make every engine look full."""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One chat completion. What must be verified is asked for whole, or verified at the end of its stream."""

    body: JsonObject
    stream: bool
    """Whether any target is to stream it."""
    prompt_tokens: int
    output_tokens: int
    wants_json: bool = False
    schema: JsonSchema | None = None
    tools: frozenset[str] = frozenset()
    original: JsonObject | None = None
    """The body as it came, where it came in another dialect and `body` is its translation."""
    forwards_as: Endpoint | None = None
    """The endpoint of `original`, where a target that speaks its dialect may be sent that."""
    stream_where_held: bool = False
    """Whether targets are to stream it whose tool calls are held to their schemas while they are written."""

    def streams(self, target: Target) -> bool:
        """Agents that always send tools would otherwise see nothing until the end. The engine of this node (it alone
        scores labels) writes no call that verification could reject."""
        return self.stream or (self.stream_where_held and target.provider is None and "labels" in target.abilities)

    def verified_late(self) -> LateVerifiedCall | None:
        if not self.body.get("stream") or self.stream:
            return None
        return LateVerifiedCall(replace(self, stream=True), ChatStreamCheck(self._check_choice))

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        """Raises Unsupported for an engine of this node where a field asks for more than an answer."""
        body, original = self.body, self._caller_body()
        if target.provider is None:
            _check_only_elsewhere(body, target)
        if target.dialect == "anthropic" and self.original is not None and self.original.get("thinking") is not None:
            body = _with_thinking(body, self.original)
        elif self.original is not None and "reasoning" not in target.abilities and "reasoning_effort" in body:
            body = {name: value for name, value in body.items() if name != "reasoning_effort"}
            original = None
        if body.get("stream") and not self.streams(target):
            body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        return (UpstreamCall("/chat/completions", body, original),)

    def _caller_body(self) -> CallerBody | None:
        if self.original is None or self.forwards_as is None:
            return None
        return CallerBody(self.forwards_as, self.original)

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> ReplyResult:
        """The target's payload, untouched. Raises BackendGarbage or RejectedReply."""
        payload = replies[0].payload
        for choice in check_choices(payload, "message"):
            self._check_choice(choice)
        return ReplyResult(payload, replies[0].usage)

    def _check_choice(self, choice: ChatChoice) -> None:
        if self.wants_json:
            check_json_choice(choice, self.schema)
        if self.tools:
            check_tool_calls(choice, self.tools)


def read_chat_request(body: JsonObject) -> tuple[ParsedRequest, Sequence[ChatCall]]:
    """Check a chat body. Raises RequestError naming field, value and remedy."""
    messages = check_messages(body)
    check_sampling(body)
    _check_options(body)
    stream = read_bool(body, "stream")
    output_tokens = read_int(body, "max_completion_tokens", 1) or read_int(body, "max_tokens", 1)
    logprobs = read_bool(body, "logprobs")
    if read_int(body, "top_logprobs", 0, MAX_TOP_LOGPROBS) and not logprobs:
        raise wrong("top_logprobs", body["top_logprobs"], "it needs logprobs: true")
    format, schema = read_response_format(body)
    tools, tools_bytes = _read_tools(body)
    needs: set[Ability] = {"chat"}
    needs |= {"json_schema"} if format != "text" else set()
    needs |= {"tools"} if tools else set()
    needs |= {"logprobs"} if logprobs else set()
    needs |= {"reasoning"} if body.get("reasoning_effort") not in (None, "none") else set()
    needs |= {"vision"} if holds_more_than_text(messages) else set()
    text = join_message_text(messages)
    asked = ParsedRequest(
        endpoint="chat",
        model=read_model(body),
        body=body,
        text=text,
        stream=stream,
        format="tools" if tools and format == "text" else format,
        needs=frozenset(needs),
        output_tokens=output_tokens,
    )
    call = ChatCall(
        body=body,
        stream=stream and format == "text" and not tools,
        prompt_tokens=estimate_tokens(text) + MESSAGE_TOKENS * len(messages) + tools_bytes // 4,
        output_tokens=(output_tokens or DEFAULT_OUTPUT_TOKENS) * (body.get("n") or 1),
        wants_json=format != "text",
        schema=schema,
        tools=tools,
        stream_where_held=stream and format == "text",
    )
    return asked, (call,)


def read_translated_chat(
    dialect: InboundDialect, original: JsonObject, *, forwards: bool = True
) -> tuple[ParsedRequest, Sequence[ChatCall]]:
    """Read a body in another dialect as the chat it is translated to. Raises RequestError naming field and remedy.

    Streams always carry usage: other dialects report it without being asked. Reasoning
    effort is a wish in them, which agents send with every request, so a model that does not reason may answer too.
    `forwards`: whether a target of the same dialect may be sent `original`, and its answer handed on as it comes.
    """
    asked, calls = _read_translated(dialect, original, dialect.read_chat(original))
    return asked, tuple(replace(call, forwards_as=dialect.endpoint if forwards else None) for call in calls)


def read_translated_count(dialect: InboundDialect, original: JsonObject) -> tuple[ParsedRequest, Sequence[ChatCall]]:
    """As `read_translated_chat`, for a request whose prompt is only counted."""
    asked, calls = _read_translated(dialect, original, dialect.read_count(original))
    return asked, tuple(replace(call, output_tokens=1) for call in calls)


def _read_translated(
    dialect: InboundDialect, original: JsonObject, chat: ChatBody
) -> tuple[ParsedRequest, Sequence[ChatCall]]:
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    asked, calls = read_chat_request(cast(JsonObject, chat))
    asked = replace(asked, endpoint=dialect.endpoint, needs=asked.needs - {"reasoning"})
    return asked, tuple(replace(call, original=original) for call in calls)


def _check_options(body: JsonObject) -> None:
    """Fields that change no answer here, and those that ask for what is not here at all."""
    for name in ("user", "safety_identifier", "prompt_cache_key", "service_tier", "verbosity"):
        read_text(body, name)
    for name in ("metadata", "prediction", "logit_bias", "web_search_options", "moderation"):
        if body.get(name) is not None:
            read_object(body[name], name, "or left out")
    for name in ("store", "parallel_tool_calls"):
        read_bool(body, name)
    effort = body.get("reasoning_effort")
    if effort is not None and (not isinstance(effort, str) or effort not in REASONING_EFFORTS):
        raise wrong("reasoning_effort", effort, f"it must be one of {', '.join(REASONING_EFFORTS)}")
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if body.get(name) is not None:
            raise Unsupported(f"{name} is the old form of {instead}, which alone is supported here", param=name)
    if body.get("audio") is not None:
        raise Unsupported("audio is not supported: answers are text; leave it out", param="audio")
    if body.get("modalities") not in (None, [], ["text"]):
        raise wrong("modalities", body["modalities"], 'answers are text: leave it out, or send ["text"]')


def _with_thinking(body: JsonObject, original: JsonObject) -> JsonObject:
    """What a caller said of thinking in Anthropic's words, for a target that understands them."""
    exact = {**body, "thinking": original["thinking"]}
    if not (original.get("output_config") or {}).get("effort"):
        exact.pop("reasoning_effort", None)
    return exact


def _check_only_elsewhere(body: JsonObject, target: Target) -> None:
    for name in ONLY_ELSEWHERE:
        value = body.get(name)
        if value is not None and not is_harmless(name, value):
            raise Unsupported(f"{name} is not something that {target.name} can do: leave it out", param=name)


def check_sampling(body: JsonObject) -> None:
    """The fields that chat and plain completions share."""
    read_int(body, "n", 1, MAX_CHOICES)
    read_number(body, "temperature", 0, 2)
    read_number(body, "top_p", 0, 1)
    read_number(body, "presence_penalty", -2, 2)
    read_number(body, "frequency_penalty", -2, 2)
    read_int(body, "seed", -(2**63), 2**63 - 1)
    stop = body.get("stop")
    if isinstance(stop, list):
        read_list(stop, "stop", 0, MAX_STOPS, "strings")
    if stop is not None and not all(isinstance(item, str) for item in (stop if isinstance(stop, list) else [stop])):
        raise wrong("stop", stop, "it must be a string or a list of strings")
    if body.get("stream_options") is not None:
        options = read_object(body["stream_options"], "stream_options", '{"include_usage": true}')
        if not isinstance(options.get("include_usage", False), bool):
            raise wrong("stream_options.include_usage", options["include_usage"], "it must be true or false")


def read_response_format(body: JsonObject) -> tuple[Format, JsonObject | None]:
    """The format asked for, and its schema where it has one."""
    value = body.get("response_format")
    if value is None:
        return "text", None
    path = "response_format"
    given = read_object(value, path, '{"type": "json_object"} or {"type": "json_schema", "json_schema": ...}')
    kind = given.get("type")
    if kind == "text":
        return "text", None
    if kind == "json_object":
        return "json_object", None
    if kind != "json_schema":
        raise wrong(f"{path}.type", kind, "it must be text, json_object or json_schema")
    inner = f"{path}.json_schema"
    if given.get("json_schema") is None:
        raise missing(inner, 'it must be {"name": ..., "schema": ...}')
    wrapper = read_object(given["json_schema"], inner, '{"name": ..., "schema": ...}')
    if "schema" not in wrapper:
        raise missing(f"{inner}.schema", "it must be a JSON schema")
    return "json_schema", check_schema(wrapper["schema"], f"{inner}.schema")


def _read_tools(body: JsonObject) -> tuple[frozenset[str], int]:
    """Names of the tools the model may call, and the size of their descriptions in bytes."""
    choice = body.get("tool_choice")
    if choice is not None and not isinstance(choice, str | dict):
        raise wrong("tool_choice", choice, "it must be none, auto, required, or an object naming a tool")
    if body.get("tools") is None:
        return frozenset(), 0
    names = []
    for index, tool in enumerate(read_list(body["tools"], "tools", 0, 1024, "tools")):
        path = f"tools[{index}]"
        kind = read_object(tool, path, '{"type": "function", "function": {...}}').get("type")
        inner = tool.get(kind) if isinstance(kind, str) else None
        if kind not in ("function", "custom") or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RequestError(
                f'{path} is {show(tool)}: it must be {{"type": "function", "function": {{"name": ...}}}}', param=path
            )
        if inner.get("parameters") is not None:
            check_schema(inner["parameters"], f"{path}.{kind}.parameters")
        names.append(inner["name"])
    if choice == "none":
        return frozenset(), 0
    return frozenset(names), len(orjson.dumps(body["tools"]))
