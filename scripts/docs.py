"""Writes the tables of README.md and appliance/docs/ that follow from the code, between their markers.

`python -m scripts.docs` rewrites them; `tests/docs` fails while they differ from the code. A table stands between
`<!-- generated: NAME -->` and `<!-- end: NAME -->`, where NAME is a key of `TABLES`.
"""

import ast
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import typer
import typer.core
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from appliance import errors
from appliance.cli import app
from appliance.config import NodeConfig, Policy
from appliance.config.providers import KINDS, ProviderPreset
from appliance.telemetry.metrics import Metrics
from scripts.fits import cpu_table, gpu_table

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
DOCS: Final = ROOT / "appliance" / "docs"

_REGION: Final = re.compile(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def pages() -> list[Path]:
    """The README and every page that `appliance docs` shows."""
    return [README, *sorted(DOCS.glob("*.md"))]


def render(text: str) -> str:
    """`text` with every generated part as the code has it now. Raises SystemExit for a part that nothing makes."""

    def fill(region: re.Match[str]) -> str:
        name = region[1]
        if name not in TABLES:
            raise SystemExit(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- generated: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    return _REGION.sub(fill, text)


# --- errors


def error_table() -> str:
    rows = ["| code | HTTP | when |", "|---|---|---|"]
    rows += [f"| `{error.code}` | {error.status} | {_when(error)} |" for error in error_classes()]
    return "\n".join(rows)


def error_classes() -> list[type[errors.ApplianceError]]:
    """Classes of the tree in errors.py, parents first; a class with the code of its parent is left out."""
    return [one for one in _descendants(errors.ApplianceError) if one.code != getattr(one.__base__, "code", None)]


def _descendants(parent: type[errors.ApplianceError]) -> Iterator[type[errors.ApplianceError]]:
    yield parent
    for child in parent.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _descendants(child)


def _when(error: type[errors.ApplianceError]) -> str:
    """What the tree in errors.py's docstring says beside the class, or its own docstring's first sentence."""
    tree = errors.__doc__ or ""
    found = re.search(rf"^\W*{error.__name__}\s+(?:\d+|\([^)]*\))\s+\S+(?:[ ]{{2,}}(.*))?$", tree, re.MULTILINE)
    if found and found[1]:
        return found[1].strip()
    own = (error.__doc__ or "") if error.__doc__ != (error.__mro__[1].__doc__ or "") else ""
    return " ".join(own.split(".")[0].split())


# --- configuration and policy


def settings_table(model: type[BaseModel]) -> str:
    """One table for each table of the TOML file, under a heading that names it."""
    groups: dict[str, list[str]] = {}
    for prefix, name, field in settings_of(model):
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        meaning = " ".join((field.description or "").split())
        row = f"| `{name}` | {describe_values(field.annotation)} | {default} | {meaning} |"
        groups.setdefault(prefix, []).append(row)
    sections = []
    for prefix, rows in groups.items():
        title = "Top level" if not prefix else f"`{_toml_header(prefix)}`"
        sections.append(
            "\n".join([f"### {title}", "", "| setting | values | default | meaning |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(sections)


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """(table, setting, field) of every setting; `[]` follows the name of a table that may stand several times."""
    nested = []
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        inner, is_list = _inner_model(field.annotation)
        if inner is None:
            yield prefix, name, field
        else:
            nested.append((f"{prefix}.{name}".lstrip(".") + ("[]" if is_list else ""), inner))
    for path, inner in nested:
        yield from settings_of(inner, path)


def _toml_header(path: str) -> str:
    """`engine.models[]` as TOML writes it: `[[engine.models]]`."""
    plain = path.replace("[]", "")
    return f"[[{plain}]]" if path.endswith("[]") else f"[{plain}]"


def _inner_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in typing.get_args(annotation):
        found, _ = _inner_model(argument)
        if found is not None:
            return found, typing.get_origin(annotation) is tuple
    return None, False


_PLAIN: Final[Mapping[Any, str]] = {bool: "true, false", int: "integer", float: "number", str: "text"}


def describe_values(annotation: Any) -> str:
    """The values that a setting may have, in the words of TOML; an optional one is described as if it were given."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {describe_values(arguments[0])}"
    if origin in (dict, Mapping):
        return f"table of {describe_values(arguments[1])}"
    inner = [argument for argument in arguments if argument is not type(None)]
    return describe_values(inner[0]) if inner and not isinstance(annotation, type) else "text"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return "" if not value else f"`{value}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in value) + "]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


# --- commands


def command_table() -> str:
    rows = ["| command | what it does |", "|---|---|"]
    rows += [f"| `appliance {name}` | {' '.join((command.help or '').split())} |" for name, command in commands()]
    return "\n".join(rows)


def commands() -> list[tuple[str, typer.core.TyperCommand]]:
    """Every command that does something, by the words that call it."""
    root = typer.main.get_command(app)
    return list(_commands_of(root, typer.Context(root), ""))


def _commands_of(command: Any, context: typer.Context, words: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    if not isinstance(command, typer.core.TyperGroup):
        yield words, command
        return
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        if child is not None and not child.hidden:
            yield from _commands_of(child, typer.Context(child, parent=context), f"{words} {name}".strip())


# --- metrics


def metric_table() -> str:
    rows = ["| series | type | labels | meaning |", "|---|---|---|---|"]
    for name, kind, labels, text in sorted(set(metrics())):
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {kind} | {shown} | {text} |")
    return "\n".join(rows)


def metrics() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(name as it is scraped, type, labels, help) of every series."""
    registry: CollectorRegistry = Metrics().registry
    labels = {
        name: tuple(getattr(collector, "_labelnames", ()))
        for name, collector in getattr(registry, "_names_to_collectors", {}).items()
    }
    for family in registry.collect():
        yield _scraped(family.name, family.type), family.type, labels.get(family.name, ()), family.documentation
    for path in sorted((ROOT / "appliance").rglob("*.py")):
        text = path.read_text("utf-8")
        if "MetricFamily" in text:
            yield from _families(ast.parse(text))


def _families(module: ast.Module) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Families that are made while the page is written: what their constructors' literals say."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        kind = node.func.id.removesuffix("MetricFamily").lower()
        if node.func.id.endswith("MetricFamily") and len(node.args) >= 2:
            name, text = (ast.literal_eval(argument) for argument in node.args[:2])
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            labels = tuple(ast.literal_eval(named["labels"])) if "labels" in named else ()
            yield _scraped(name, kind), kind, labels, text


def _scraped(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else f"{name}_info" if kind == "info" else name


# --- providers


def provider_table() -> str:
    rows = ["| kind | dialect | address | key header | batches | fields it is not given |", "|---|---|---|---|---|---|"]
    rows += [_provider_row(name, preset) for name, preset in KINDS.items()]
    return "\n".join(rows)


def _provider_row(name: str, preset: ProviderPreset) -> str:
    address = f"`{preset.base_url}`" if preset.base_url else f"`https://*{preset.host}`" if preset.host else "yours"
    refused = ", ".join(f"`{one}`" for one in sorted(preset.wire.refuses | preset.wire.leaves_out))
    batches = f"`{preset.wire.batches}`" if preset.wire.batches else ""
    return f"| `{name}` | {preset.dialect} | {address} | `{preset.wire.key_header}` | {batches} | {refused} |"


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "errors": error_table,
    "config": lambda: settings_table(NodeConfig),
    "policy": lambda: settings_table(Policy),
    "commands": command_table,
    "metrics": metric_table,
    "providers": provider_table,
    "fits-gpu": cache(gpu_table),
    "fits-cpu": cache(cpu_table),
}


def main() -> None:
    for page in pages():
        page.write_text(render(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
