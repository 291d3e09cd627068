"""What the documentation shows, on a node with the embedded model: requests, code and commands, page by page."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.docs import README, ROOT, pages
from tests.docs.blocks import Block, appliance_arguments, blocks, curl_request
from tests.docs.test_blocks import NODE, missing_modules
from tests.e2e.conftest import SMALL_ENGINE, home_with_model
from tests.running import running_node

pytestmark = pytest.mark.slow

COMMANDS = ("tasks ", "jobs list", "classifiers train", "keys list", "report")
"""What is run of a page's commands: all that asks the node or its ledger and ends by itself, but for names made up."""
ANY_BODIES = (
    '{"messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}], "max_tokens": 8}',
    '{"messages": [{"role": "user", "content": "Prove that the square root of two is irrational, step by step."}],'
    ' "max_tokens": 8}',
)
LABELLED = {
    "lost_card": ["my card was stolen", "I lost my card", "somebody took my card", "the card is gone"],
    "balance": ["how much money do I have", "what is my balance", "show my balance", "money left on my account"],
}


@dataclass
class Reader:
    """Does what a page says, in a folder of its own, beside a running node."""

    url: str
    folder: Path

    def follow(self, block: Block) -> None:
        if block.language == "toml" and "/" not in block.info:
            (self.folder / block.info).write_text(block.text)
        elif block.language == "json" and block.info.startswith("POST "):
            answer = httpx.post(self.url + block.info.removeprefix("POST "), json=json.loads(block.text), timeout=60)
            assert answer.status_code == 200, f"{block}: {answer.text}"
        elif block.language == "python" and not missing_modules(block) and not block.info.startswith("needs "):
            self.run(block, [sys.executable, "-c", block.text.replace(NODE, self.url)])
        elif block.language == "sh":
            for words in block.commands():
                self.type(block, words)

    def type(self, block: Block, words: list[str]) -> None:
        arguments = appliance_arguments(words)
        if curl_request(words) is not None:
            self.run(block, ["curl", "--fail-with-body", *(word.replace(NODE, self.url) for word in words[1:])])
        elif arguments is not None and " ".join(arguments).startswith(COMMANDS):
            self.run(block, [sys.executable, "-m", "appliance", *arguments, "--config", str(self.folder / "node.toml")])

    def run(self, block: Block, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{block}: {command}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def reader(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    home = home_with_model(tmp_path_factory.mktemp("node"), smollm2_path)
    rows = [json.dumps({"text": text, "label": label}) for label, texts in LABELLED.items() for text in texts]
    (folder / "examples.jsonl").write_text("\n".join(rows))
    with running_node(home, config=SMALL_ENGINE) as running:
        port = running.url.rpartition(":")[2]
        (folder / "node.toml").write_text(f'data_dir = "{home}"\n[server]\nport = {port}\n')
        yield Reader(running.url, folder)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_can_be_followed_from_its_top_to_its_end(page: Path, reader: Reader) -> None:
    shown = [block for block in blocks("toml", "json", "python", "sh") if block.page == page]
    for block in sorted(shown, key=lambda block: block.line):
        reader.follow(block)


@pytest.fixture
def provider() -> Iterator[str]:
    """The address of a provider that speaks OpenAI's dialect, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.standin"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def readme_file(name: str, containing: str) -> str:
    (found,) = [
        block.text
        for block in blocks("toml")
        if block.page == README and block.info == name and containing in block.text
    ]
    return found


def test_the_overflow_set_up_of_the_readme_sends_out_what_is_complex_and_nothing_that_is_bound(
    smollm2_path: Path, tmp_path: Path, provider: str
) -> None:
    home = home_with_model(tmp_path / "home", smollm2_path)
    (tmp_path / "policy.toml").write_text(readme_file("policy.toml", '"complex"'))
    config = readme_file("appliance.toml", "[[providers]]").replace("qwen3-4b", "smollm2-135m-instruct")
    config = config.replace('"policy.toml"', f'"{tmp_path / "policy.toml"}"').replace(
        "https://api.openai.com/v1", provider
    )
    easy, complex_one = (json.loads(body) for body in ANY_BODIES)
    with running_node(home, config=config, environment={"OPENAI_API_KEY": "sk-example"}) as node:
        ask = f"{node.url}/v1/chat/completions"
        asked: tuple[tuple[Any, dict[str, str]], ...] = (
            (easy, {}),
            (complex_one, {}),
            (complex_one, {"x-appliance-residency": "onsite"}),
        )
        answers = [httpx.post(ask, json=body, headers=headers, timeout=60).headers for body, headers in asked]
    found = [(answer["x-appliance-location"], answer["x-appliance-reason"]) for answer in answers]
    assert [location for location, _ in found] == ["onsite", "hosted", "onsite"], found
