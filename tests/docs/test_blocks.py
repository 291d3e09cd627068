"""Every block of code in the documentation works: what would read it parses it, and it is run where that is quick."""

import importlib.util
import json
import re
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path

import anyio
import httpx
import pytest
import typer.core
from typer.testing import CliRunner

from appliance.cli import app
from appliance.config import DEFAULT_POLICY_PATH, load_config, parse_policy
from scripts.docs import DOCS, README, ROOT, commands, pages
from tests.docs.blocks import Block, appliance_arguments, blocks, curl_request
from tests.providers.speech import HELLO
from tests.router.scene import engine_target
from tests.wire.matrix.stages import EngineApi, node_over

NODE = "http://127.0.0.1:8080"
LANGUAGES = {"sh", "python", "toml", "json", "yaml", "ini", "nginx", ""}
PROVIDER = """
[[providers]]
name = "openai"
base_url = "https://api.openai.com/v1"
key_env = "OPENAI_API_KEY"
models = [{ name = "gpt-6-mini", input_usd = 0.25, output_usd = 2.0 }]
"""
CATCH_ALL = '\n[[routes]]\nname = "the-rest"\ntargets = ["onsite"]\n'


def test_every_block_says_what_it_is() -> None:
    named = set(re.findall(r"^```(\S*)", "\n".join(page.read_text("utf-8") for page in pages()), re.MULTILINE))
    assert named == LANGUAGES
    for page in pages():
        assert page.read_text("utf-8").count("\n```") % 2 == 0, page


def test_links_between_the_pages_lead_somewhere() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for page in {*pages(), *(ROOT / name for name in listed.splitlines())}:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)):
            place, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in _anchors(target), f"{page.name}: {link}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_leads_to_every_page() -> None:
    text = README.read_text("utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if f"](appliance/docs/{page.name})" not in text]


# --- shell


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_a_shell_block_is_one_that_bash_takes(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_the_commands_of_a_shell_block_exist_with_their_options(block: Block) -> None:
    for words in block.commands():
        arguments = appliance_arguments(words)
        if arguments is not None:
            parse(arguments)
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists(), words[0]


known_commands = cache(commands)


def parse(arguments: list[str]) -> None:
    """Let the real command line read the arguments, without running the command."""
    known = dict(known_commands())
    name = next((name for name in (" ".join(arguments[:2]), arguments[0]) if name in known), None)
    assert name is not None, f"there is no command {arguments[:2]}"
    command: typer.core.TyperCommand = known[name]
    with command.make_context(name, list(arguments[len(name.split()) :])):
        pass


class Folder:
    """A working folder in which the commands of a page run one after the other."""

    RUN = ("policy ", "plan", "probe", "models list", "keys ", "report")

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "old.toml").write_text(DEFAULT_POLICY_PATH.read_text("utf-8"))
        (path / "body.json").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
        (path / "appliance.toml").write_text(PROVIDER)
        (path / "hardware").symlink_to(ROOT / "hardware")

    def put(self, block: Block) -> None:
        if block.info.endswith(".toml") and "/" not in block.info:
            (self.path / block.info).write_text(block.text)

    def run(self, block: Block) -> int:
        ran = 0
        for words in block.commands():
            arguments = appliance_arguments(words)
            if arguments is not None and " ".join(arguments).startswith(self.RUN):
                done = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert done.exit_code == 0, f"{block}: {arguments}: {done.output}"
                ran += 1
        return ran


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APPLIANCE_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-example")
    yield Folder(tmp_path)


@pytest.mark.parametrize("name", ["README", "policy", "models", "operations"])
def test_commands_that_need_no_node_run_with_the_files_that_the_page_gives(name: str, folder: Folder) -> None:
    ran = 0
    for block in (block for block in blocks("sh", "toml") if block.page.stem == name):
        if block.language == "sh":
            ran += folder.run(block)
        else:
            folder.put(block)
    assert ran


# --- files


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_a_toml_block_is_read_by_what_reads_such_a_file(block: Block, tmp_path: Path) -> None:
    if block.info == "appliance.toml":
        path = tmp_path / "appliance.toml"
        path.write_text(block.text)
        load_config(path)
    elif block.info == "policy.toml":
        parse_policy(block.text if _ends_open(block.text) else block.text + CATCH_ALL, str(block))
    elif block.info == "mail.toml":
        assert set(tomllib.loads(block.text)) == {"description", "questions", "examples"}
    else:
        assert block.info.startswith("~/"), f"{block}: name the file behind the language"
        tomllib.loads(block.text)


def _ends_open(text: str) -> bool:
    """Whether a policy's last route takes everything."""
    routes = tomllib.loads(text).get("routes", [])
    return bool(routes) and "match" not in routes[-1]


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_json_block_is_json(block: Block) -> None:
    assert isinstance(json.loads(block.text), dict)


@pytest.mark.parametrize("block", blocks("nginx"), ids=str)
def test_the_reverse_proxy_waits_longer_than_a_route_does_and_buffers_nothing(block: Block) -> None:
    waits = re.search(r"proxy_read_timeout (\d+)s", block.text)
    assert (
        waits is not None
        and int(waits[1]) > parse_policy(DEFAULT_POLICY_PATH.read_text("utf-8"), "").defaults.total_seconds
    )
    limit = re.search(r"client_max_body_size (\d+)m", block.text)
    assert limit is not None and int(limit[1]) * 1_000_000 >= load_config(None).server.max_body_bytes
    assert "proxy_buffering off" in block.text and block.text.count("{") == block.text.count("}")


# --- requests


@pytest.fixture
async def node() -> AsyncIterator[str]:
    """A node over an engine that answers chats, whatever they ask."""
    async with EngineApi(HELLO) as engine:
        target = engine_target(engine.address, abilities=frozenset({"chat", "tools", "json_schema"}))
        async with node_over(target) as (url, _):
            yield url


def missing_modules(block: Block) -> list[str]:
    names = re.findall(r"^(?:import|from) (\w+)", block.text, re.MULTILINE)
    return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.mark.anyio
@pytest.mark.parametrize("block", [block for block in blocks("python") if block.page.name != "jobs.md"], ids=str)
async def test_a_python_block_runs_against_a_node(block: Block, node: str) -> None:
    code = compile(block.text.replace(NODE, node), str(block), "exec")
    assert NODE in block.text
    if missing := missing_modules(block):
        pytest.skip(f"{', '.join(missing)} is not installed")
    await anyio.to_thread.run_sync(exec, code, {"__name__": "__main__", "print": lambda *_: None})


CHATS = ("/v1/chat/completions", "/v1/explain")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "block", [block for block in blocks("sh") if any(path in block.text for path in CHATS)], ids=str
)
async def test_the_chats_and_dry_runs_that_are_shown_with_curl_are_answered(block: Block, node: str) -> None:
    async with httpx.AsyncClient() as client:
        for words in block.commands():
            request = curl_request(words)
            if request is not None and request[0].endswith(CHATS):
                address, headers, body = request
                answer = await client.post(address.replace(NODE, node), headers=headers, content=body)
                assert answer.status_code == 200, answer.text
