"""appliance docs: the manual that comes with the program, page by page."""

import ast
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

import typer
from rich.markdown import Markdown

from appliance.cli.output import fail, say, stdout

MAP_TOPIC = "map"
_MAP_COLUMN = 34


def docs_command(
    topic: Annotated[str | None, typer.Argument(help="A page's name, or `map`; empty: the list of pages.")] = None,
) -> None:
    """Show a page of the manual, or list the pages; `map` lists the program's files.

    On a terminal pages are laid out; elsewhere they are the Markdown text as it was written.
    """
    pages = read_topics()
    if topic is None:
        width = max(map(len, [*pages, MAP_TOPIC]))
        for name, text in pages.items():
            say(f"{name:<{width}}  {_title(text)}")
        say(f"{MAP_TOPIC:<{width}}  Every file of the program with its first sentence")
        return
    if topic == MAP_TOPIC:
        say("\n".join(file_map(files("appliance"))))
        return
    if topic not in pages:
        fail(f"there is no page {topic!r}: there are {', '.join([*pages, MAP_TOPIC])}")
    if stdout.is_terminal:
        stdout.print(Markdown(pages[topic]))
    else:
        say(pages[topic].rstrip())


def read_topics() -> Mapping[str, str]:
    """The pages' texts by topic, in order of name."""
    folder = files("appliance").joinpath("docs")
    pages = [page for page in folder.iterdir() if page.name.endswith(".md")] if folder.is_dir() else []
    return {
        page.name.removesuffix(".md"): page.read_text("utf-8") for page in sorted(pages, key=lambda page: page.name)
    }


def file_map(package: Traversable, depth: int = 0) -> Iterator[str]:
    """A line for each module and package below `package`, with the first sentence of its docstring."""
    entries = sorted(package.iterdir(), key=lambda entry: (entry.is_dir(), entry.name))
    for entry in entries:
        if entry.name.endswith(".py") and entry.name != "__init__.py":
            yield _map_line(entry.name, entry, depth)
        elif entry.is_dir() and entry.joinpath("__init__.py").is_file():
            yield _map_line(f"{entry.name}/", entry.joinpath("__init__.py"), depth)
            yield from file_map(entry, depth + 1)


def _map_line(name: str, module: Traversable, depth: int) -> str:
    text = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return f"{'  ' * depth + name:<{_MAP_COLUMN}} {first}".rstrip()


def _title(text: str) -> str:
    """The page's first heading, else its first line."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.strip()), "")
