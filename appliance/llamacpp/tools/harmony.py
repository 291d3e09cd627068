"""gpt-oss's replies: messages in channels, `<|channel|>NAME to=functions.TOOL<|message|>...`, one after the other."""

import re
from collections.abc import Sequence
from typing import Final

from appliance.llamacpp.tools.source import ReplyCursor, Step

_RECIPIENT: Final = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_HARMONY_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")


def read_harmony(source: ReplyCursor) -> Step[None]:
    """A whole reply in channels: analysis is reasoning, a recipient makes a call, all else is content."""
    header = ""
    begun = False
    while True:
        text, marker = yield from _text_before(source, ("<|message|>", *_HARMONY_ENDS))
        header += text
        if not marker:
            if not begun and header:  # no channel at all: plain words
                source.content(0, len(source.text))
            return
        if marker != "<|message|>":
            begun = True
            # A header may name its recipient before or behind the channel, so it goes on over that marker.
            header = header + marker if marker == "<|channel|>" else ""
            continue
        begun = True
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if not (yield from _message(source, channel.group(1) if channel else "final", recipient)):
            return
        header = "<|channel|>" if source.text.endswith("<|channel|>", 0, source.position) else ""


def _text_before(source: ReplyCursor, markers: Sequence[str]) -> Step[tuple[str, str]]:
    parts: list[str] = []
    marker = yield from source.until(markers, lambda start, stop: parts.append(source.text[start:stop]))
    return "".join(parts), marker


def _message(source: ReplyCursor, channel: str, recipient: re.Match[str] | None) -> Step[bool]:
    """One message; false where the reply ends with it."""
    if recipient is not None:
        source.open_call(recipient.group(1))
        yield from source.json(source.arguments)
        source.close_call()
        marker = yield from source.until(_HARMONY_ENDS, lambda start, stop: None)
    elif channel == "analysis":
        marker = yield from source.until(_HARMONY_ENDS, lambda start, stop: source.reasoning(source.text[start:stop]))
    else:
        marker = yield from source.until(_HARMONY_ENDS, source.content)
        source.flush_space()
    return bool(marker)
