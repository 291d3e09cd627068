"""Other people's tests against a node with the embedded model: `scripts/conformance [--json FILE] [suite...]`."""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from scripts.benchmarks.peers.installing import ROOT
from scripts.conform import fields, spoiled
from scripts.conform.environment import CannotInstall, Environment, installed
from scripts.conform.outcomes import Outcome, judged, of_junit, reasons, rules, table
from tests.running import running_node

SUITE_SECONDS: Final = 3_600
_SDK_FILES: Final = {
    "openai": (
        "chat/test_completions.py",
        "test_completions.py",
        "test_models.py",
        "test_embeddings.py",
        "test_responses.py",
        "responses/test_input_tokens.py",
    ),
    "anthropic": ("test_messages.py", "test_models.py"),
}
_POLICY: Final = """\
[aliases]
"gpt-*" = "smollm2-135m-instruct"
"text-embedding-*" = "smollm2-135m-instruct"
"claude-*" = "smollm2-135m-instruct"
"model" = "smollm2-135m-instruct"
"model_id" = "smollm2-135m-instruct"

[[routes]]
name = "all"
targets = ["onsite"]
"""
_CONFIG: Final = """\
[engine]
threads = 1
context_tokens = 16384
sequences = 8

[[providers]]
name = "script"
kind = "compatible"
location = "onsite"
base_url = "{scripted}"
models = [{{ name = "scripted", abilities = ["chat", "json_schema", "tools", "vision"] }}]
"""


class NotRun(Exception):
    """A suite cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a suite runs: the node's address, the tests' environment, a folder for reports."""

    url: str
    environment: Environment
    folder: Path


def sdk_tests(place: Place, suite: str) -> list[Outcome]:
    source = place.environment.sources(suite)
    files = [str(Path("tests", "api_resources", name)) for name in _SDK_FILES[suite]]
    base = f"{place.url}/v1" if suite == "openai" else place.url
    return _pytest(place, suite, ["-o", "addopts=", "-n", "3", *files], base, source)


def langchain(place: Place, suite: str) -> list[Outcome]:
    ini = place.folder / "langchain.ini"
    scope = "asyncio_default_{}_loop_scope = session\n"
    ini.write_text(f"[pytest]\nasyncio_mode = auto\n{scope.format('fixture')}{scope.format('test')}")
    file = ROOT / "scripts" / "conform" / f"{suite.replace('-', '_')}_standard.py"
    return _pytest(place, suite, ["-c", str(ini), "-p", "no:socket", str(file)], place.url, place.folder)


def _pytest(place: Place, suite: str, arguments: Sequence[str], base: str, folder: Path) -> list[Outcome]:
    report = place.folder / f"{suite}.xml"
    command = [str(place.environment.python), "-m", "pytest", "--quiet", "--tb=line", "--timeout", "180"]
    command += ["-p", "no:cacheprovider", "-p", "no:logging", "--junitxml", str(report), *arguments]
    _run(command, folder, {"TEST_API_BASE_URL": base})
    if not report.exists():
        raise NotRun("pytest wrote no report")
    return of_junit(suite, report, rules())


def fields_alone(place: Place, suite: str) -> list[Outcome]:
    return list(fields.outcomes(place.url, {sdk: place.environment.sources(sdk) for sdk in _SDK_FILES}))


def schemathesis(place: Place, suite: str) -> list[Outcome]:
    """Whether answers are never a defect, and have the form that the description promises."""
    given = os.environ.get("APPLIANCE_EVAL_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    description = folder / "conformance" / "openai_openapi_subset.json"
    if not description.exists():
        raise NotRun(f"there is no {description.name} (APPLIANCE_EVAL_DATA names the folder that has it)")
    report = place.folder / "schemathesis.ndjson"
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance"
    command = [str(place.environment.bin / "st"), "run", str(description), "--url", f"{place.url}/v1"]
    command += ["--checks", checks, "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1"]
    command += ["--max-time", "240", "--request-timeout", "60", "--continue-on-failure", "--no-color"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
    _run(command, place.folder, {})
    if not report.exists():
        raise NotRun("schemathesis wrote no report")
    return list(_of_schemathesis(suite, report))


def _of_schemathesis(suite: str, report: Path) -> Iterator[Outcome]:
    for line in report.read_text("utf-8").splitlines():
        row = json.loads(line).get("ScenarioFinished")
        if row is None or row.get("status") == "skip":
            continue
        recorder = row["recorder"]
        broken = [
            check for checks in recorder["checks"].values() for check in checks if check.get("status") == "failure"
        ]
        test = f"{recorder['label']} ({row['phase']})"
        if not broken:
            yield Outcome(suite, test, "passed")
            continue
        said = json.dumps(broken[0].get("failure_info") or broken[0])
        yield judged(suite, test, said, rules())


def fuzz(place: Place, suite: str) -> list[Outcome]:
    return asyncio.run(spoiled.outcomes(spoiled.COUNT))


SUITES: Final[dict[str, Callable[[Place, str], list[Outcome]]]] = {
    "openai": sdk_tests,
    "anthropic": sdk_tests,
    "fields": fields_alone,
    "langchain-openai": langchain,
    "langchain-anthropic": langchain,
    "schemathesis": schemathesis,
    "fuzz": fuzz,
}


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Tests that fail are no error here: their report tells."""
    given = {**os.environ, **environment, "NO_PROXY": "127.0.0.1"}
    subprocess.run(
        command, cwd=folder, env=given, check=False, timeout=SUITE_SECONDS, stdout=subprocess.DEVNULL, stdin=None
    )


@contextlib.contextmanager
def _scripted() -> Iterator[str]:
    """The address of the scripted model."""
    command = [sys.executable, "-m", "scripts.conform.scripted"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def _node(folder: Path) -> Iterator[str]:
    home = folder / "node"
    (home / "models").mkdir(parents=True)
    given = os.environ.get("APPLIANCE_TEST_MODEL")
    if given:
        model = home / "models" / "smollm2-135m-instruct"
        model.mkdir()
        (model / "q4_1.gguf").symlink_to(Path(given).resolve())
    with _scripted() as scripted:
        started = running_node(home, config=_CONFIG.format(scripted=scripted), policy=_POLICY, seconds=300)
        with started as node:
            yield node.url


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/conformance")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    parser.add_argument("suite", nargs="*", help=f"some of {', '.join(SUITES)}; all where none is named")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suite if name not in SUITES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no suite: there are {', '.join(SUITES)}")
    try:
        environment = installed(lambda text: print(text, file=sys.stderr))
    except CannotInstall as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder, _node(Path(folder)) as url:
        for suite in arguments.suite or SUITES:
            print(f"running {suite}", file=sys.stderr)
            try:
                outcomes += SUITES[suite](Place(url, environment, Path(folder)), suite)
            except (NotRun, subprocess.TimeoutExpired) as error:
                skipped[suite] = str(error)
            if arguments.json:
                rows = [asdict(one) for one in outcomes]
                arguments.json.write_text(json.dumps({"outcomes": rows, "not run": skipped}, indent=1))
    print(table(outcomes, skipped))
    print()
    print(reasons(outcomes))
    return 1 if any(one.result == "failed" for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
