"""gpt-oss's replies: messages in channels, `<|channel|>NAME to=functions.TOOL<|message|>...`, one after the other."""

import re
from collections.abc import Sequence
from typing import Final

from appliance.llamacpp.tools.cursor import ReplyCursor, Step

_RECIPIENT: Final = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_HARMONY_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")


def read_harmony(cursor: ReplyCursor) -> Step[None]:
    """A whole reply in channels: analysis is reasoning, a recipient makes a call, all else is content."""
    header = ""
    begun = False
    while True:
        text, marker = yield from _text_before(cursor, ("<|message|>", *_HARMONY_ENDS))
        header += text
        if not marker:
            if not begun and header:  # no channel at all: plain words
                cursor.content(0, len(cursor.text))
            return
        if marker != "<|message|>":
            begun = True
            # A header may name its recipient before or behind the channel, so it goes on over that marker.
            header = header + marker if marker == "<|channel|>" else ""
            continue
        begun = True
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if not (yield from _message(cursor, channel.group(1) if channel else "final", recipient)):
            return
        header = "<|channel|>" if cursor.text.endswith("<|channel|>", 0, cursor.position) else ""


def _text_before(cursor: ReplyCursor, markers: Sequence[str]) -> Step[tuple[str, str]]:
    parts: list[str] = []
    marker = yield from cursor.until(markers, lambda start, stop: parts.append(cursor.text[start:stop]))
    return "".join(parts), marker


def _message(cursor: ReplyCursor, channel: str, recipient: re.Match[str] | None) -> Step[bool]:
    """One message; false where the reply ends with it."""
    if recipient is not None:
        cursor.open_call(recipient.group(1))
        yield from cursor.json(cursor.arguments)
        cursor.close_call()
        marker = yield from cursor.until(_HARMONY_ENDS, lambda start, stop: None)
    elif channel == "analysis":
        marker = yield from cursor.until(_HARMONY_ENDS, lambda start, stop: cursor.reasoning(cursor.text[start:stop]))
    else:
        marker = yield from cursor.until(_HARMONY_ENDS, cursor.content)
        cursor.flush_space()
    return bool(marker)
