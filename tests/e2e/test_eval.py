"""appliance eval with a node of its own, and a saved task with evidence at that node."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.running import running_node

pytestmark = pytest.mark.slow

CONFIG = "[engine]\ncontext_tokens = 4096\nsequences = 4\nthreads = 1\ncalibrate = false\n"
ROWS = [("The team won the cup final", "sports"), ("The bank raised its rates", "business")] * 3


def _home(path: Path, smollm2_path: Path) -> Path:
    folder = path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    shutil.copyfile(smollm2_path, folder / "q4_1.gguf")
    return path


@pytest.mark.timeout(300)
def test_eval_starts_a_node_asks_it_and_ends_it(smollm2_path: Path, tmp_path: Path) -> None:
    home = _home(tmp_path / "home", smollm2_path)
    (tmp_path / "appliance.toml").write_text(CONFIG)
    data = tmp_path / "news.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{text} {n}", "label": label}) + "\n" for n, (text, label) in enumerate(ROWS))
    )
    command = [sys.executable, "-m", "appliance", "eval", str(data), "--start", "--json", "--config"]
    command += [str(tmp_path / "appliance.toml"), "--data-dir", str(home), "--model", "onsite/smollm2-135m-instruct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["models"]["onsite/smollm2-135m-instruct"]
    assert figures["errors"] == 0 and figures["rows"] == 6 and figures["input_tokens"] > 100
    assert figures["label_mass"] is not None and figures["cost_usd"] is not None


@pytest.mark.timeout(300)
def test_a_saved_extraction_copies_from_the_text_and_shows_where(smollm2_path: Path, tmp_path: Path) -> None:
    text = "Invoice from Acme Ltd of 31/03/2017. The total is EUR 99.50."
    properties = {"day": {"type": "string", "format": "date"}, "total": {"type": "number", "x-normalise": "amount"}}
    example = {
        "text": "Invoice from Bolt of 30/01/2016. The total is EUR 5.00.",
        "object": {"day": "30/01/2016", "total": "5.00"},
    }
    task = {
        "name": "invoice",
        "schema": {"type": "object", "properties": properties, "required": ["day", "total"]},
        "examples": [example],
        "evidence": True,
        "normalise": True,
    }
    with running_node(_home(tmp_path, smollm2_path), config=CONFIG, seconds=120) as node:
        assert httpx.post(f"{node.url}/v1/tasks", json=task, timeout=60).status_code == 200
        first = httpx.post(f"{node.url}/v1/extract", json={"task": "invoice", "text": text}, timeout=120).json()
        other = httpx.post(
            f"{node.url}/v1/extract", json={"task": "invoice", "text": f"{text} Thanks."}, timeout=120
        ).json()
    with running_node(tmp_path, config=CONFIG, seconds=120) as node:
        kept = httpx.get(f"{node.url}/v1/tasks/invoice", timeout=60).json()
    for place, span in first["evidence"].items():
        raw = first["normalised"][place]["raw"]
        # A model of 135M may copy the wrong thing; where it copied, the place must be that of the copy.
        assert (place in first["not_in_text"]) if span is None else text[span["start"] : span["end"]] == raw
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] > 60, "the examples are computed once"
    assert kept["version"] == 1 and kept["examples"] == [example]
