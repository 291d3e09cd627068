"""Fenced blocks of the documentation, and the commands in its shell blocks."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.docs import ROOT, pages

_FENCE = re.compile(r"^```(?P<language>[\w-]*)[ ]?(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    info: str
    """What stands behind the language: the file that a block is, or the request that sends it."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The simple commands of a shell block as words, comments left out."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        for words in _simple_commands(joined):
            if words:
                yield words


def _simple_commands(text: str) -> Iterator[list[str]]:
    """Words up to the end of a line that no quotation marks span."""
    pending = ""
    for line in text.splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue
        yield words
        pending = ""
    assert not pending, f"a quotation does not end: {pending}"


def blocks(*languages: str) -> list[Block]:
    """Every block in one of these languages, page by page."""
    found = []
    for page in pages():
        text = page.read_text("utf-8")
        for fence in _FENCE.finditer(text):
            if fence["language"] in languages:
                line = text.count("\n", 0, fence.start()) + 1
                found.append(Block(page, line, fence["language"], fence["info"].strip(), fence["text"]))
    return found


def appliance_arguments(words: Sequence[str]) -> list[str] | None:
    """The arguments for this program's command line; None where the command is another program's."""
    rest = list(words)
    while rest and re.fullmatch(r"[A-Z_]+=.*", rest[0]):
        rest.pop(0)
    if rest[:2] == ["docker", "compose"] and "cpu" in rest:
        return rest[rest.index("cpu") + 1 :]
    if rest and rest[0] == "scripts/serve":
        return ["serve", *rest[1:]]
    return rest[1:] if rest and rest[0] == "appliance" else None


def curl_request(words: Sequence[str]) -> tuple[str, dict[str, str], str] | None:
    """(address, headers, body) of a curl command of the forms that the pages use; None for another program."""
    if not words or words[0] != "curl":
        return None
    address, headers, body = "", {}, ""
    rest = iter(words[1:])
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = next(rest)
        elif not word.startswith("-"):
            address = word
    return address, headers, body
