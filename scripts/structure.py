"""What the tree looks like: its figures, and the rules about names, sizes and imports that no linter has.

`python -m scripts.structure` prints the figures; with `--check` it lists what breaks a rule and exits with code 1.
Exceptions stand in pyproject.toml under `[tool.structure]`, each with its reason.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = "appliance"
MAX_FILE_LINES: Final = 350
"""A longer file holds more than one subject."""
MAX_FOLDER_MODULES: Final = 15
"""More than that are not taken in at a glance. `__init__` and `__main__` are not counted."""
LONG_FUNCTION_LINES: Final = 40
"""Counted in the figures; the check leaves it to reviewers, as some functions are tables."""
_UNTYPED: Final = re.compile(r"\b(?:dict|Mapping)\[str, Any\]")
_UNCOUNTED: Final = frozenset({"__init__.py", "__main__.py"})


@dataclass(frozen=True, slots=True)
class Module:
    """One Python file. `name` is its path from the root, with slashes."""

    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Exceptions:
    """What pyproject.toml lets stand: each key with the reason."""

    long_files: Mapping[str, str] = field(default_factory=dict)
    wide_folders: Mapping[str, str] = field(default_factory=dict)
    duplicate_classes: Mapping[str, str] = field(default_factory=dict)
    undeclared_imports: Mapping[str, str] = field(default_factory=dict)


def read_modules(root: Path, package: str = PACKAGE) -> Sequence[Module]:
    """Every Python file of the package, in order of name."""
    found = []
    for path in sorted((root / package).rglob("*.py")):
        text = path.read_text("utf-8")
        found.append(Module(path.relative_to(root).as_posix(), text, ast.parse(text, path.name)))
    return found


def read_exceptions(project: Mapping[str, Any]) -> Exceptions:
    """The table `[tool.structure]` of a parsed pyproject.toml."""
    return Exceptions(**project.get("tool", {}).get("structure", {}))


# -- rules: each gives sentences, none where all is well -------------------------------------------------------------


def find_problems(modules: Sequence[Module], exceptions: Exceptions, declared: Collection[str]) -> Sequence[str]:
    """Every broken rule as a sentence. `declared` are the distributions that pyproject.toml names."""
    return [
        *find_duplicate_classes(modules, exceptions.duplicate_classes),
        *find_long_files(modules, exceptions.long_files),
        *find_wide_folders(modules, exceptions.wide_folders),
        *find_undeclared_imports(modules, declared, exceptions.undeclared_imports),
    ]


def find_duplicate_classes(modules: Sequence[Module], allowed: Mapping[str, str]) -> Iterator[str]:
    """A class name has one meaning. Names with a leading underscore belong to their module alone."""
    places = class_places(modules)
    for name, files in sorted(places.items()):
        if len(files) > 1 and name not in allowed:
            yield f"class {name} is defined {len(files)} times: {', '.join(files)}; give each its own name"
    yield from _stale("duplicate_classes", allowed, {name for name, files in places.items() if len(files) > 1})


def find_long_files(modules: Sequence[Module], allowed: Mapping[str, str]) -> Iterator[str]:
    long = {module.name: module.lines for module in modules if module.lines > MAX_FILE_LINES}
    for name, lines in sorted(long.items()):
        if name not in allowed:
            yield f"{name} has {lines} lines; at most {MAX_FILE_LINES}: divide it by subject"
    yield from _stale("long_files", allowed, long)


def find_wide_folders(modules: Sequence[Module], allowed: Mapping[str, str]) -> Iterator[str]:
    wide = {name: count for name, count in count_folder_modules(modules).items() if count > MAX_FOLDER_MODULES}
    for name, count in sorted(wide.items()):
        if name not in allowed:
            yield f"{name}/ has {count} modules; at most {MAX_FOLDER_MODULES}: make subfolders"
    yield from _stale("wide_folders", allowed, wide)


def find_undeclared_imports(
    modules: Sequence[Module], declared: Collection[str], allowed: Mapping[str, str]
) -> Iterator[str]:
    """What is imported directly must be declared: another package may stop bringing it along."""
    distributions = packages_distributions()
    names = {canonicalize_name(name) for name in declared}
    undeclared: dict[str, str] = {}
    for module in modules:
        for imported in sorted(_imports(module.tree)):
            owners = {canonicalize_name(owner) for owner in distributions.get(imported, (imported,))}
            if not owners & names:
                undeclared.setdefault(imported, module.name)
    for name, file in sorted(undeclared.items()):
        if name not in allowed:
            yield f"{file} imports {name}, which pyproject.toml does not declare"
    yield from _stale("undeclared_imports", allowed, undeclared)


def declared_distributions(project: Mapping[str, Any]) -> frozenset[str]:
    """Dependencies and extras of a parsed pyproject.toml, by name."""
    extras = project["project"].get("optional-dependencies", {})
    lines = [*project["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    return frozenset(Requirement(line).name for line in lines)


def _stale(rule: str, allowed: Mapping[str, str], broken: Collection[str]) -> Iterator[str]:
    """An exception that nothing needs any more would hide the next one."""
    for name, reason in allowed.items():
        if name not in broken:
            yield f"[tool.structure] {rule}: {name} is no exception any more; remove it"
        elif not reason.strip():
            yield f"[tool.structure] {rule}: {name} has no reason"


def _imports(tree: ast.Module) -> frozenset[str]:
    """Top names of what is imported from outside the package and the standard library."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    return frozenset(tops - sys.stdlib_module_names - {PACKAGE})


# -- figures ---------------------------------------------------------------------------------------------------------


def class_places(modules: Sequence[Module]) -> Mapping[str, Sequence[str]]:
    """Class name without a leading underscore -> the files that define it, as often as they do."""
    places: dict[str, list[str]] = {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module.name)
    return places


def count_folder_modules(modules: Sequence[Module]) -> Counter[str]:
    return Counter(module.folder for module in modules if module.name.rpartition("/")[2] not in _UNCOUNTED)


def count_long_functions(modules: Sequence[Module]) -> int:
    """Functions of more than LONG_FUNCTION_LINES lines, their docstrings included."""
    functions = (
        node
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 > LONG_FUNCTION_LINES for node in functions)


def count_untyped_mappings(modules: Sequence[Module]) -> int:
    """Occurrences of `dict[str, Any]` and `Mapping[str, Any]`."""
    return sum(len(_UNTYPED.findall(module.text)) for module in modules)


def collect_figures(modules: Sequence[Module], readme: Path) -> Mapping[str, str]:
    """What the table shows: a figure's name and its value as text."""
    folders = count_folder_modules(modules)
    widest = ", ".join(f"{name} {count}" for name, count in folders.most_common(5))
    duplicates = sum(len(files) > 1 for files in class_places(modules).values())
    text = readme.read_text("utf-8")
    return {
        "files": f"{len(modules):,}",
        "lines": f"{sum(module.lines for module in modules):,}",
        f"files over {MAX_FILE_LINES} lines": str(sum(module.lines > MAX_FILE_LINES for module in modules)),
        f"functions over {LONG_FUNCTION_LINES} lines": str(count_long_functions(modules)),
        f"folders over {MAX_FOLDER_MODULES} modules": str(sum(n > MAX_FOLDER_MODULES for n in folders.values())),
        "modules of the widest folders": widest,
        "class names with several meanings": str(duplicates),
        "untyped mappings": str(count_untyped_mappings(modules)),
        "README": f"{text.count(chr(10)):,} lines, {len(text.encode()) / 1024:.0f} KB",
    }


def lines_by_package(modules: Sequence[Module]) -> Counter[str]:
    """Lines of each package directly below the top one; files beside them are counted by their own name."""
    counted: Counter[str] = Counter()
    for module in modules:
        counted[module.name.split("/")[1]] += module.lines
    return counted


def main(arguments: Sequence[str]) -> int:
    modules = read_modules(ROOT)
    if "--check" in arguments:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        problems = find_problems(modules, read_exceptions(project), declared_distributions(project))
        print("\n".join(problems) or "structure: nothing to say")
        return 1 if problems else 0
    figures = collect_figures(modules, ROOT / "README.md")
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    print("\nlines by package")
    for name, lines in lines_by_package(modules).most_common():
        print(f"{name:<{width}}  {lines:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
