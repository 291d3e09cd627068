"""Real servers as providers of a node: another node of ours, and vLLM for CPUs, by every dialect that each speaks."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.conftest import SMALL_ENGINE, home_with_model
from tests.running import RunningNode, running_node
from tests.vllm_cpu import real_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EIFFEL: Any = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
MODEL = "smollm2-135m-instruct"
POLICY = '[aliases]\n"gpt-*" = "auto"\n"claude-*" = "auto"\n\n[[routes]]\nname = "out"\ntargets = ["hosted"]\n'
ANTHROPIC_BEFORE_SAMPLING_WENT = "2023-06-01"


def row(name: str, kind: str, base_url: str, model: str, more: str = "") -> str:
    prices = "input_usd = 1.0, output_usd = 2.0"
    return (
        f'[[providers]]\nname = "{name}"\nkind = "{kind}"\nbase_url = "{base_url}"\n{more}'
        f'models = [{{ name = "{model}", abilities = ["chat", "json_schema"], {prices} }}]\n'
    )


@contextlib.contextmanager
def node_before(home: Path, model: Path, providers: str) -> Iterator[RunningNode]:
    """A node whose every request goes out to one of `providers`."""
    with running_node(
        home_with_model(home, model), config=SMALL_ENGINE + providers, policy=POLICY, seconds=120
    ) as node:
        yield node


def check_all_dialects(url: str, target: str) -> None:
    """Whole and streamed, by two SDKs, with names of other APIs' models that the policy knows."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240) as gpt:
        asked: dict[str, Any] = {"model": target, "messages": EIFFEL, "max_tokens": 24, "temperature": 0}
        raw = gpt.chat.completions.with_raw_response.create(**asked)
        assert (raw.headers["x-appliance-target"], raw.headers["x-appliance-location"]) == (target, "hosted")
        whole = raw.parse()
        assert "Paris" in (whole.choices[0].message.content or "")
        assert whole.usage is not None and whole.usage.prompt_tokens > 10
        pieces = gpt.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        said, usage = "", None
        for piece in pieces:
            said += "".join(choice.delta.content or "" for choice in piece.choices)
            usage = piece.usage or usage
        assert said == whole.choices[0].message.content and usage is not None
        # What is cached the second time counts all the same.
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=240) as claude:
        question: dict[str, Any] = {"model": target, "max_tokens": 24, "messages": EIFFEL}
        question["extra_body"] = {"temperature": 0}
        message = claude.messages.create(**question)
        assert message.content[0].type == "text" and message.content[0].text == said
        with claude.messages.stream(**question) as stream:
            assert stream.get_final_text() == said
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == usage.prompt_tokens


def test_another_node_by_its_three_dialects(smollm2_path: Path, tmp_path: Path) -> None:
    inner = home_with_model(tmp_path / "inner", smollm2_path)
    with running_node(inner, config=SMALL_ENGINE, seconds=120) as far:
        old = f'api_version = "{ANTHROPIC_BEFORE_SAMPLING_WENT}"\n'
        providers = row("ours", "appliance", f"{far.url}/v1", MODEL)
        providers += row("claude", "anthropic", f"{far.url}/v1", MODEL, old)
        providers += row("google", "gemini", f"{far.url}/v1beta", MODEL)
        with node_before(tmp_path / "outer", smollm2_path, providers) as node:
            for name in ("ours", "claude", "google"):
                check_all_dialects(node.url, f"{name}/{MODEL}")
            with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as gpt:
                renamed = gpt.chat.completions.with_raw_response.create(
                    model="gpt-6", messages=EIFFEL, max_tokens=3, extra_headers={"x-appliance-tag": "x"}
                )
                assert renamed.headers["x-appliance-target"] == f"ours/{MODEL}"


@contextlib.contextmanager
def vllm_served(home: Path) -> Iterator[str]:
    vllm = real_vllm()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(vllm.environment.folder / "bin" / "vllm"), "serve", str(vllm.weights), "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "2048"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    home.mkdir(parents=True, exist_ok=True)
    with (home / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _until_up(f"http://127.0.0.1:{port}/health", process, home / "vllm.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_up(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(1)
    raise RuntimeError(f"vLLM is not up in time: {log.read_text()[-2000:]}")


def test_vllm_by_openais_dialect_and_by_anthropics(smollm2_path: Path, tmp_path: Path) -> None:
    with vllm_served(tmp_path / "vllm") as base:
        old = f'api_version = "{ANTHROPIC_BEFORE_SAMPLING_WENT}"\n'
        providers = row("vllm", "vllm", base, MODEL) + row("claude", "anthropic", base, MODEL, old)
        with node_before(tmp_path / "outer", smollm2_path, providers) as node:
            for name in ("vllm", "claude"):
                check_all_dialects(node.url, f"{name}/{MODEL}")
