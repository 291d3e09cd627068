"""What the engines are asked: exact token counts, the same for every engine, another text in every run.

Texts differ from run to run (`seed`), or caches would answer. Real data is taken from a folder where there is one.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.tokens import Messages, Tokens, chat, chatml, filling, fitted

ROOT: Final = Path(__file__).resolve().parents[2]

PREFIX_TOKENS: Final = 146
TEXT_TOKENS: Final = 31
LONG_TEXT_TOKENS: Final = 300
CHAT_TOKENS: Final = 156
ANSWER_TOKENS: Final = 128
RECEIPT_TOKENS: Final = 273
ARRIVING_TOKENS: Final = 2_000
PREFILL_TOKENS: Final = 512

TOPICS: Final[Mapping[str, str]] = {
    "billing": "invoices and charges",
    "delivery": "parcels on their way",
    "refund": "money to be given back",
    "account": "profile and settings",
    "technical": "faults of the product",
    "login": "passwords and access",
    "order": "placing or changing an order",
    "other": "everything else",
}
_INSTRUCTIONS = "Decide which team of the shop should handle the message that a customer has sent to us."
_WHO = ("my sister", "our office", "the neighbour", "my manager", "a friend", "the driver", "your colleague", "my son")
_DOES = ("asked about", "waits for", "cannot find", "paid twice for", "returned", "wants to change", "lost", "reported")
_WHAT = (
    "the blue lamp",
    "an invoice",
    "the parcel",
    "a password",
    "the contract",
    "two chairs",
    "a booking",
    "the app",
)
_WHEN = ("last week", "on Monday", "this morning", "since March", "two days ago", "yesterday", "at noon", "in May")
_REPLY = "Reply with exactly one of the possible answers and nothing else."


@dataclass(frozen=True, slots=True)
class Decisions:
    """One question about many texts. `instructions` are written into `system` for servers that know only chats."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    descriptions: tuple[str, ...]
    fillers: int
    prompt_tokens: int
    """Of the longest whole prompt."""
    codes: tuple[str, ...] | None
    """A word of one token for each label, where the labels' own first tokens do not tell them apart."""
    read_tokens: tuple[int, ...]
    """The token whose probability stands for each label in a one-token read."""

    @property
    def instructions(self) -> str:
        return self.instructions_with(self.fillers)

    def instructions_with(self, fillers: int) -> str:
        return _INSTRUCTIONS + filling(fillers)

    @property
    def system(self) -> str:
        return _system(self.instructions, self.labels, self.descriptions)

    @property
    def coded_system(self) -> str:
        if self.codes is None:
            return self.system
        described = [f"{label}, {about}" for label, about in zip(self.labels, self.descriptions, strict=True)]
        return _system(self.instructions, self.codes, described)


@dataclass(frozen=True, slots=True)
class Chats:
    chats: tuple[Messages, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Receipts:
    texts: tuple[str, ...]
    system: str
    instructions: str
    schema: Mapping[str, Any]
    max_tokens: int


def _system(instructions: str, labels: Sequence[str], descriptions: Sequence[str]) -> str:
    options = "\n".join(f"- {label}: {about}" for label, about in zip(labels, descriptions, strict=True))
    return f"{instructions}\nPossible answers:\n{options}\n{_REPLY}"


QUESTIONS: Final[tuple[Mapping[str, Any], ...]] = (
    {
        "type": "choice",
        "name": "team",
        "instructions": "Which team should handle the message?",
        "choices": [{"value": value} for value in TOPICS],
    },
    {"type": "predicate", "name": "urgent", "instructions": "The customer needs an answer today."},
    {"type": "predicate", "name": "angry", "instructions": "The customer is angry."},
    {
        "type": "choice",
        "name": "tone",
        "instructions": "What is the tone of the message?",
        "choices": [{"value": value} for value in ("friendly", "neutral", "hostile")],
    },
    {
        "type": "score",
        "name": "effort",
        "instructions": "How much work will the answer be?",
        "levels": [{"label": label} for label in ("none", "little", "some", "much")],
    },
)

_FIELDS = ("company", "address", "date", "time", "number", "total")
SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 40} for name in _FIELDS[:5]} | {"total": {"type": "number"}},
    "required": list(_FIELDS),
    "additionalProperties": False,
}
_EXTRACT = "Extract the fields of the receipt."


class Workloads:
    """Makes every workload for the tokenizer of one model. `data` holds real texts; None: all are made up."""

    def __init__(self, tokens: Tokens, data: Path | None) -> None:
        self.tokens = tokens
        self._data = data

    @property
    def source(self) -> str:
        return "made-up texts" if self._data is None else "banking77 and SROIE receipts; the other texts are made up"

    def decisions(self, count: int, seed: int) -> Decisions:
        """8 labels; 146 tokens before each text, 31 in it."""
        labels, about = tuple(TOPICS), tuple(TOPICS.values())
        fillers = self._fillers(labels, about)
        system = _system(_INSTRUCTIONS + filling(fillers), labels, about)
        sentences = _sentences(random.Random(f"decisions {seed}"))
        texts = self._texts(system, [next(sentences) for _ in range(count)])
        return self._decisions(texts, labels, about, fillers, None)

    def many_labels(self, count: int, seed: int) -> Decisions:
        """77 labels with a description each, and short texts of their own lengths."""
        rows = self._rows("classification/banking77_fewshot.jsonl")
        about: dict[str, str] = {}
        for row in rows:
            about.setdefault(row["label"], row["text"].strip())
        about = dict(sorted(about.items())) or _made_up_labels()
        randomness = random.Random(f"many labels {seed}")
        tests = [row["text"] for row in self._rows("classification/banking77_test.jsonl")]
        if tests:
            texts = randomness.sample(tests, count)
        else:
            sentences = _sentences(randomness)
            texts = [next(sentences) for _ in range(count)]
        labels = tuple(about)
        return self._decisions(tuple(texts), labels, tuple(about.values()), 0, self._codes(len(labels)))

    def long_texts(self, count: int, seed: int) -> tuple[str, ...]:
        """300 tokens each."""
        return self._stories(f"long texts {seed}", count, LONG_TEXT_TOKENS)

    def chats(self, count: int, seed: int) -> Chats:
        """156 tokens in, 128 out; no two begin alike."""
        system = "You are the assistant of a shop."
        randomness = random.Random(f"chats {seed}")
        chats = []
        for _ in range(count):
            story = _story(randomness, 160)
            user = fitted(story, CHAT_TOKENS, lambda text: self.tokens.count(chat(system, text)))
            chats.append(chat(system, user))
        return Chats(tuple(chats), ANSWER_TOKENS)

    def receipts(self, count: int, seed: int) -> Receipts:
        """Six fields; 273 tokens in, with the shortest instructions that name the fields."""
        system = f"{_EXTRACT} Reply with one JSON object: {', '.join(_FIELDS)}."
        randomness = random.Random(f"receipts {seed}")
        rows = [row["text"] for row in self._rows("extraction/sroie_receipts.jsonl")]
        rows = randomness.sample(rows, count) if rows else [_receipt(randomness) for _ in range(count)]
        texts = tuple(fitted(row, RECEIPT_TOKENS, lambda text: self.tokens.count(chat(system, text))) for row in rows)
        return Receipts(texts, system, _EXTRACT, SCHEMA, 224)

    def arriving(self, count: int, seed: int) -> Chats:
        """2,000 tokens in, one out."""
        system = "Summarise the messages."
        randomness = random.Random(f"arriving {seed}")
        chats = []
        for _ in range(count):
            user = fitted(
                _story(randomness, 2_200), ARRIVING_TOKENS, lambda text: self.tokens.count(chat(system, text))
            )
            chats.append(chat(system, user))
        return Chats(tuple(chats), 1)

    def prefill(self, count: int, seed: int) -> tuple[list[int], ...]:
        """Token ids, 512 each: nothing but prefill."""
        stories = self._stories(f"prefill {seed}", count, PREFILL_TOKENS)
        return tuple(self.tokens.ids(story) for story in stories)

    def _decisions(
        self,
        texts: tuple[str, ...],
        labels: tuple[str, ...],
        about: tuple[str, ...],
        fillers: int,
        codes: tuple[str, ...] | None,
    ) -> Decisions:
        read_tokens = tuple(self.tokens.ids(word)[0] for word in codes or labels)
        if len(set(read_tokens)) < len(labels):
            raise ValueError("two labels begin with the same token: give them codes")
        made = Decisions(texts, labels, about, fillers, 0, codes, read_tokens)
        longest = max(self.tokens.count(chat(made.system, text)) for text in texts)
        return Decisions(texts, labels, about, fillers, longest, codes, read_tokens)

    def _fillers(self, labels: Sequence[str], about: Sequence[str]) -> int:
        """How many filler words make what stands before the text 146 tokens long."""
        for fillers in range(PREFIX_TOKENS):
            system = _system(_INSTRUCTIONS + filling(fillers), labels, about)
            if self.prefix_tokens(system) == PREFIX_TOKENS:
                return fillers
        raise ValueError(f"the labels take more than {PREFIX_TOKENS} tokens")

    def prefix_tokens(self, system: str) -> int:
        """Tokens before the user's text."""
        before, _, _ = chatml(chat(system, "\0")).partition("\0")
        return len(self.tokens.ids(before))

    def _texts(self, system: str, sentences: Sequence[str]) -> tuple[str, ...]:
        _, _, after = chatml(chat(system, "\0")).partition("\0")
        wanted = PREFIX_TOKENS + TEXT_TOKENS + len(self.tokens.ids(after))
        return tuple(fitted(text, wanted, lambda one: self.tokens.count(chat(system, one))) for text in sentences)

    def _stories(self, name: str, count: int, wanted: int) -> tuple[str, ...]:
        randomness = random.Random(name)
        return tuple(
            fitted(_story(randomness, wanted), wanted, lambda text: len(self.tokens.ids(text))) for _ in range(count)
        )

    def _codes(self, count: int) -> tuple[str, ...]:
        """Distinct words of one token: A, B, ..., then pairs of letters."""
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        words = [*letters, *(first + second for first in letters for second in letters)]
        single = [word for word in words if len(self.tokens.ids(word)) == 1]
        return tuple(single[:count])

    def _rows(self, path: str) -> list[dict[str, Any]]:
        if self._data is None:
            return []
        with (self._data / path).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def data_folder() -> Path | None:
    """Real texts: the folder that APPLIANCE_EVAL_DATA names, or one beside the checkout; None where there is none."""
    named = os.environ.get("APPLIANCE_EVAL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    wanted = ("classification/banking77_test.jsonl", "classification/banking77_fewshot.jsonl")
    found = all((folder / name).is_file() for name in (*wanted, "extraction/sroie_receipts.jsonl"))
    return folder if found else None


def _sentences(randomness: random.Random) -> Iterator[str]:
    """Messages of about 40 tokens, each with a number of its own."""
    while True:
        number = randomness.randint(10_000, 99_999)
        yield f"Case {number}: " + " and ".join(_clause(randomness) for _ in range(4)) + "."


def _clause(randomness: random.Random) -> str:
    return " ".join(randomness.choice(words) for words in (_WHO, _DOES, _WHAT, _WHEN))


def _story(randomness: random.Random, tokens: int) -> str:
    """At least so many tokens, and words enough to be cut to it."""
    sentences = _sentences(randomness)
    return " ".join(next(sentences) for _ in range(tokens // 24 + 1))


def _receipt(randomness: random.Random) -> str:
    """A till's receipt with all six fields, longer than will be kept."""
    company = f"{randomness.choice(('NORTH', 'GREEN', 'RIVER', 'SUN'))} {randomness.choice(('TRADING', 'MARKET'))} LTD"
    lines = [company, f"NO {randomness.randint(1, 99)} STATION ROAD", "TEL 03-5551 2200"]
    lines += [
        f"RECEIPT NO {randomness.randint(10_000, 99_999)}",
        f"DATE 2018-0{randomness.randint(1, 9)}-14 TIME 10:45",
    ]
    prices = [randomness.randint(100, 9_999) / 100 for _ in range(16)]
    lines.append(f"TOTAL {sum(prices):.2f}")
    lines += [f"{randomness.choice(_WHAT)[:18].upper()} 1 X {price:.2f}" for price in prices]
    return " \n".join(lines)


def _made_up_labels() -> dict[str, str]:
    pairs = [(does, what) for what in _WHAT for does in (*_DOES, "likes", "broke")]
    return {f"{does} {what}".replace(" ", "_"): f"somebody {does} {what}" for does, what in pairs[:77]}
