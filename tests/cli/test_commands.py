"""The command line as a whole: what it lists, what it loads, and the manual it carries."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files

import pytest
from typer.testing import CliRunner

from appliance.cli import app
from appliance.cli.commands import COMMANDS, CommandEntry
from appliance.cli.docs import file_map, read_topics

RUN = CliRunner()
HEAVY = ("fastapi", "starlette", "uvicorn", "numpy", "sqlalchemy", "httpx", "aiohttp", "llama_cpp", "rich")
TOPICS = list(read_topics())


def entries() -> Iterator[tuple[list[str], CommandEntry]]:
    for entry in COMMANDS:
        if isinstance(entry, CommandEntry):
            yield [entry.name], entry
        else:
            yield from (([entry.name, one.name], one) for one in entry.commands)


@pytest.mark.parametrize("words", [["--help"], ["jobs", "--help"], ["models", "--help"], ["policy", "--help"]])
def test_help_loads_no_server_no_engine_and_no_numerical_library(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from appliance.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('loaded', sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert "Commands:" in done.stdout


@pytest.mark.parametrize(
    ("words", "entry"), list(entries()), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_command_says_in_the_list_what_its_function_says(words: list[str], entry: CommandEntry) -> None:
    first = (inspect.getdoc(entry.load()) or "").partition("\n\n")[0]
    assert entry.help == " ".join(first.split())
    shown = RUN.invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    assert " ".join(words) in shown.output and "--help" in shown.output


def test_a_command_that_does_not_exist_is_named() -> None:
    done = RUN.invoke(app, ["jobs", "wotch"])
    assert done.exit_code == 2
    assert "wotch" in done.output


def test_docs_lists_every_page_that_comes_with_the_program() -> None:
    done = RUN.invoke(app, ["docs"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == [*TOPICS, "map"]
    shipped = sorted(page.name for page in files("appliance").joinpath("docs").iterdir() if page.name.endswith(".md"))
    assert [f"{topic}.md" for topic in TOPICS] == shipped


@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_is_shown_as_it_is_written_where_nobody_sees_a_terminal(topic: str) -> None:
    done = RUN.invoke(app, ["docs", topic])
    assert done.exit_code == 0
    assert done.output.strip() == read_topics()[topic].strip()


def test_a_page_that_does_not_exist_is_refused_with_those_that_do() -> None:
    done = RUN.invoke(app, ["docs", "nothing"])
    assert done.exit_code == 1
    assert "'nothing'" in done.output and "map" in done.output


def test_the_map_has_every_module_with_its_first_sentence() -> None:
    lines = RUN.invoke(app, ["docs", "map"]).output.splitlines()
    assert lines == list(file_map(files("appliance")))
    assert any(line.strip().startswith("commands.py") and "Every command with its help" in line for line in lines)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines), "a module without a docstring"
