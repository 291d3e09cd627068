"""Writes the parts of README.md that follow from the code: errors, configuration, commands, the map,
and which model fits which hardware.

`python -m scripts.readme` rewrites them between their markers; a test fails while they differ from the code.
"""

import ast
import re
import subprocess
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from appliance import errors
from appliance.cli import app
from appliance.config import NodeConfig, Policy
from scripts.fits import fit_tables

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
_TOP_LEVEL = ("appliance", "model_configs", "hardware", "scripts", "tests")


def render(text: str) -> str:
    """`text` with every generated part as the code has it now."""
    sections = {
        "errors": error_table(),
        "config": config_table(NodeConfig),
        "policy": config_table(Policy),
        "commands": command_table(),
        "map": file_map(),
        "fits": fit_tables(),
    }
    for name, section in sections.items():
        begin, end = f"<!-- {name}: made by scripts/fix -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md lacks the markers {begin} and {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    return text


def error_table() -> str:
    rows = ["| code | HTTP | when |", "|---|---|---|"]
    for error in _subclasses(errors.ApplianceError):
        rows.append(f"| `{error.code}` | {error.status} | {_first_sentence(error)} |")
    return "\n".join(rows)


def _subclasses(parent: type[errors.ApplianceError]) -> Iterator[type[errors.ApplianceError]]:
    yield parent
    for child in parent.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _subclasses(child)


def _first_sentence(error: type[errors.ApplianceError]) -> str:
    """What the tree in errors.py's docstring says beside the class, or its own docstring's first sentence."""
    tree = errors.__doc__ or ""
    found = re.search(rf"[├└]── {error.__name__}\s+(?:\d+|\([^)]*\))\s+\S+(?:[ ]{{2,}}(.*))?$", tree, re.MULTILINE)
    if found and found[1]:
        return found[1].strip()
    own = (error.__doc__ or "") if error.__doc__ != (error.__mro__[1].__doc__ or "") else ""
    return own.split(".")[0].strip().replace("\n", " ")


def config_table(model: type[BaseModel]) -> str:
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for path, field in _fields(model, ""):
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{path}` | {default} | {meaning} |".replace("\n", " "))
    return "\n".join(rows)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        inner, is_list = _inner_model(field.annotation)
        path = f"{prefix}{name}{'[]' if is_list else ''}"
        if inner is None:
            yield path, field
        else:
            yield from _fields(inner, f"{path}.")


def _inner_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        found, _ = _inner_model(argument)
        if found is not None:
            return found, origin is tuple
    if origin is typing.Annotated or isinstance(annotation, types.UnionType):
        return None, False
    return None, False


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in value) + "]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def command_table() -> str:
    rows = ["| command | what it does |", "|---|---|"]
    for name, help_text in _commands(app, ""):
        rows.append(f"| `appliance {name}` | {help_text} |")
    return "\n".join(rows)


def _commands(group: typer.Typer, prefix: str) -> Iterator[tuple[str, str]]:
    for command in group.registered_commands:
        function = command.callback
        assert function is not None
        name = command.name or function.__name__.replace("_", "-")
        text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        yield prefix + name, text
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from _commands(sub.typer_instance, f"{prefix}{sub.name} ")


def file_map() -> str:
    """Every folder and module of the package, and the other top-level folders, each with its own first sentence."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = sorted(Path(name) for name in tracked if (ROOT / name).is_file())
    lines = ["```"]
    for top in _TOP_LEVEL:
        inside = [path for path in files if path.parts[0] == top]
        lines.append(f"{top + '/':<30} {_folder_text(top, inside)}".rstrip())
        if top == "appliance":
            lines += [line for path in _in_order(inside) for line in _package_line(path)]
    return "\n".join([*lines, "```"])


_FOLDERS = {
    "appliance": "the program",
    "model_configs": "data: one file a model, with its variants, sources and checksums",
    "hardware": "data: what classes of devices can do until they are measured",
    "scripts": "the commands for people and for CI, and the pinned requirements",
    "tests": "mirrors appliance/; e2e/ starts real nodes",
}


def _folder_text(top: str, files: list[Path]) -> str:
    return f"{_FOLDERS[top]} ({sum(1 for _ in files)} files)" if top in ("model_configs", "hardware") else _FOLDERS[top]


def _in_order(files: list[Path]) -> list[Path]:
    """Modules of the package itself first, then room by room; a room's own sentence before its modules'."""
    modules = [path for path in files if path.suffix == ".py" and path != Path("appliance/__init__.py")]
    return sorted(modules, key=lambda path: (len(path.parts) > 2, path.parent.parts, path.name != "__init__.py", path))


def _package_line(path: Path) -> list[str]:
    depth = len(path.parts) - 1
    name = path.parent.name + "/" if path.name == "__init__.py" else path.name
    if path.name == "__init__.py":
        depth -= 1
    text = (ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].rstrip(".")
    return [f"{'  ' * depth + name:<30} {sentence}".rstrip()]


def main() -> None:
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
