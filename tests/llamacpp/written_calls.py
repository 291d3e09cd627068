"""Replies with tool calls in every format, written as the models of each family write them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.core import ToolFormat
from appliance.llamacpp.tools.cursor import ContentDelta, Event, ReasoningDelta, ToolCallArgumentsDelta, ToolCallStart
from appliance.llamacpp.tools.parser import ReplySyntaxes, ToolReplyParser

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["c", "f"]},
                    "hourly": {"type": "boolean"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "get_weather": TOOLS[0]["function"]["parameters"],
    "now": {"type": "object"},
}

ARGUMENTS = '{"city": "Paris", "days": 3}'
_CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
_NOW = '{"name": "now", "arguments": {}}'


def deepseek(words: str) -> str:
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


_BEGIN, _END = deepseek("tool calls begin"), deepseek("tool calls end")
_ONE, _SHUT, _SEP = deepseek("tool call begin"), deepseek("tool call end"), deepseek("tool sep")

TWO_CALLS: Mapping[ToolFormat, str] = {
    "hermes": f"<tool_call>\n{_CALL}\n</tool_call>\n<tool_call>\n{_NOW}\n</tool_call>",
    "hermes_list": f"<tool_call>[{_CALL}, {_NOW}]</tool_call>",
    "granite": f"<|tool_call|>[{_CALL}, {_NOW}]",
    "phi4": f"<|tool_call|>[{_CALL}, {_NOW}]<|/tool_call|>",
    "mistral": f"[TOOL_CALLS][{_CALL}, {_NOW}]",
    "mistral_named": f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    "llama3": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
    "deepseek_v3": (
        f"{_BEGIN}{_ONE}function{_SEP}get_weather\n```json\n{ARGUMENTS}\n```{_SHUT}\n"
        f"{_ONE}function{_SEP}now\n```json\n{{}}\n```{_SHUT}{_END}"
    ),
    "deepseek_v31": f"{_BEGIN}{_ONE}get_weather{_SEP}{ARGUMENTS}{_SHUT}{_ONE}now{_SEP}{{}}{_SHUT}{_END}",
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    ),
    "pythonic": '[get_weather(city="Paris", days=3), now()]',
    "lfm2": '<|tool_call_start|>[get_weather(city="Paris", days=3), now()]<|tool_call_end|>',
    "harmony": (
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    ),
}


@dataclass
class Message:
    """What a caller puts together from the events of a stream."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case ContentDelta():
                    self.content += event.text
                case ReasoningDelta():
                    self.reasoning += event.text
                case ToolCallStart():
                    assert event.index == len(self.calls)
                    self.calls.append([event.name, ""])
                case ToolCallArgumentsDelta():
                    assert event.index == len(self.calls) - 1
                    self.calls[-1][1] += event.text


def read(text: str, read_as: ReplySyntaxes, cuts: Sequence[int] = (), *, cut: bool = False) -> Message:
    """The message that `text` is, arriving in pieces that end at `cuts`."""
    reading, message = ToolReplyParser(read_as), Message()
    edge = 0
    for stop in [*cuts, len(text)]:
        message.add(reading.push(text[edge:stop]))
        edge = stop
    message.add(reading.close(truncated=cut))
    return message
