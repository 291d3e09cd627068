"""The open routing data as rows to train and to test on. Nothing of it is part of this repository.

Which rows may shape weights that are shipped is decided here, by the licence of their source.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core import Task

WEAK: Final = "mistral-7b-instruct-v0.3"
STRONG: Final = "llama-3.1-nemotron-51b-instruct"
MT_WEAK: Final = "mistralai/Mixtral-8x7B-Instruct-v0.1"
MT_STRONG: Final = "gpt-4-1106-preview"

FILES: Final[Mapping[str, str]] = {
    "mmlu": "routellm_mmlu_29subjects.jsonl",
    "gsm8k": "routellm_gsm8k.jsonl",
    "llmrouter": "llmrouter_9models_train_sample.jsonl",
    "mtbench": "mtbench_scores.jsonl",
    "domains": "vllmsr_domain_cases.jsonl",
    "mixed": "mixed_requests.jsonl",
}

LICENCES: Final[Mapping[str, str]] = {
    "mmlu": "Apache-2.0 (MMLU: MIT)",
    "gsm8k": "Apache-2.0 (GSM8K: MIT)",
    "llmrouter": "MIT",
    "mtbench": "Apache-2.0",
    "domains": "Apache-2.0",
    "banking77": "CC-BY-4.0",
    "sms_spam": "CC-BY-4.0",
    "restaurant8k": "CC-BY-4.0",
    "wnut17": "CC-BY-4.0",
    "bfcl": "Apache-2.0",
}
"""Sources whose rows may be learned from. Left out: agnews (not for commercial use), sroie (terms of a competition) and
xquad_en (share-alike)."""

KIN: Final[Mapping[str, frozenset[str]]] = {
    "mmlu": frozenset({"mmlu"}),
    "gsm8k": frozenset({"gsm8k", "agentverse-mgsm"}),
    "llmrouter": frozenset(),
}
"""Kinds of LLMRouter rows that are questions of the same collection: left out together with it."""

_TEST_SHARE: Final = 5
"""One text in this many is for tests."""

_OF_TYPE: Final[Mapping[str, Task]] = {
    "classification": "classification",
    "extraction": "extraction",
    "extractive_qa": "extraction",
    "math": "reasoning",
    "reasoning": "reasoning",
    "code": "code",
    "tool_call": "chat",
    "knowledge_qa": "chat",
}
_OF_KIND: Final[Mapping[str, Task]] = {
    "mbpp": "code",
    "human_eval": "code",
    "coding": "code",
    "gsm8k": "reasoning",
    "math": "reasoning",
    "agentverse-mgsm": "reasoning",
    "agentverse-logicgrid": "reasoning",
    "gpqa": "reasoning",
    "reasoning": "reasoning",
    "writing": "generation",
    "roleplay": "generation",
    "humanities": "chat",
    "stem": "chat",
    "extraction": "extraction",
}
"""By LLMRouter's task or MT-Bench's category; everything else there is a question: chat."""

RIGHT: Final[Mapping[str, frozenset[Task]]] = {
    "classification": frozenset({"classification"}),
    "extraction": frozenset({"extraction"}),
    "extractive_qa": frozenset({"extraction"}),
    "math": frozenset({"reasoning"}),
    "reasoning": frozenset({"reasoning"}),
    "code": frozenset({"code"}),
    "tool_call": frozenset({"tool_use", "chat"}),
    "knowledge_qa": frozenset({"chat"}),
    "open_ended": frozenset({"generation", "chat", "summarisation"}),
}
"""Which answers count as right on mixed_requests.jsonl, by its task_type; open-ended rows mix three of our tasks."""


@dataclass(frozen=True, slots=True)
class Row:
    dataset: str
    """A key of FILES, or "made" for our own templates."""
    source: str
    """Where the row comes from, a key of LICENCES where it may be learned from."""
    kind: str
    """Its task or category there."""
    text: str
    task: Task | None
    """None where the data does not say it."""
    gain: float | None = None
    """What the strong model was better than the weak one, -1 to 1; None where nobody measured it."""
    weak: float = 0.0
    strong: float = 0.0
    has_tools: bool = False

    @property
    def is_test(self) -> bool:
        return is_test_text(self.text)


def is_test_text(text: str) -> bool:
    """By a hash of the letters and digits of its last 400 characters: the same question under another instruction, or
    in another file, falls on the same side."""
    core = re.sub(r"\W+", " ", text.lower()).strip()[-400:]
    return hashlib.sha256(core.encode()).digest()[0] % _TEST_SHARE == 0


def read_rows(folder: Path) -> list[Row]:
    """Every row of the files in `folder` (the data's `routing`), those that may not be learned from too."""
    return [row for name, file in FILES.items() for row in _rows_of(name, _lines(folder / file))]


def may_train(row: Row) -> bool:
    return row.source in LICENCES and not row.is_test


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _rows_of(name: str, lines: Iterator[Mapping[str, Any]]) -> Iterator[Row]:
    for line in lines:
        match name:
            case "mmlu" | "gsm8k":
                weak, strong = float(line["weak_correct"]), float(line["strong_correct"])
                task: Task = "chat" if name == "mmlu" else "reasoning"
                yield Row(name, name, name, line["text"], task, strong - weak, weak, strong)
            case "llmrouter":
                weak, strong = line["scores"][WEAK], line["scores"][STRONG]
                kind = line["task"]
                yield Row(name, name, kind, line["text"], _OF_KIND.get(kind, "chat"), strong - weak, weak, strong)
            case "mtbench":
                weak, strong = (line["scores"][model]["1"] / 10 for model in (MT_WEAK, MT_STRONG))
                kind = line["category"]
                task = "reasoning" if kind == "math" else _OF_KIND.get(kind, "chat")
                yield Row(name, name, kind, line["turns"][0], task, strong - weak, weak, strong)
            case "domains":
                kind = line["category"]
                yield Row(name, name, kind, line["question"], "reasoning" if kind == "math" else "chat")
            case _:
                yield _mixed_row(line)


def _mixed_row(line: Mapping[str, Any]) -> Row:
    kind, subtask = line["task_type"], line.get("subtask", "")
    text = "\n".join(message["content"] for message in line["messages"])
    task = _OF_KIND.get(subtask, "chat") if kind == "open_ended" else _OF_TYPE[kind]
    return Row("mixed", line["source"], kind, text, task, has_tools=bool(line.get("tools")))
