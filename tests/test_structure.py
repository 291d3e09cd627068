"""The rules about names, sizes and imports find what breaks them, and exceptions that nothing needs."""

import ast
import tomllib

import pytest

from scripts.structure import (
    MAX_FILE_LINES,
    MAX_FOLDER_MODULES,
    ROOT,
    Exceptions,
    Module,
    collect_figures,
    count_long_functions,
    count_untyped_mappings,
    declared_distributions,
    find_duplicate_classes,
    find_long_files,
    find_problems,
    find_undeclared_imports,
    find_wide_folders,
    read_exceptions,
    read_modules,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def module(name: str, text: str) -> Module:
    return Module(name, text, ast.parse(text))


TWICE = [module("appliance/a.py", "class Desk: ...\nclass _Own: ...\n"), module("appliance/b.py", "class Desk: ...\n")]


def test_a_class_name_with_two_meanings_is_found() -> None:
    (problem,) = find_duplicate_classes(TWICE, {})
    assert "Desk is defined 2 times" in problem and "appliance/a.py, appliance/b.py" in problem
    assert not list(find_duplicate_classes(TWICE, {"Desk": "both are desks"}))


def test_names_with_an_underscore_may_return_and_classes_inside_classes_count() -> None:
    inner = [module("appliance/a.py", "class _Own: ...\nclass A:\n    class Desk: ...\n"), *TWICE[1:]]
    assert len(list(find_duplicate_classes(inner, {}))) == 1


@pytest.mark.parametrize(
    ("find", "modules", "name"),
    [
        (find_long_files, [module("appliance/a.py", "x = 1\n" * (MAX_FILE_LINES + 1))], "appliance/a.py"),
        (
            find_wide_folders,
            [module(f"appliance/a/m{i}.py", "") for i in range(MAX_FOLDER_MODULES + 1)],
            "appliance/a",
        ),
    ],
)
def test_what_is_too_large_is_found_unless_pyproject_says_why(find: object, modules: list[Module], name: str) -> None:
    assert callable(find)
    (problem,) = find(modules, {})
    assert name in problem
    assert not list(find(modules, {name: "a table"}))
    assert "no reason" in next(iter(find(modules, {name: " "})))


def test_the_package_itself_and_its_main_are_no_modules_of_a_folder() -> None:
    names = ["__init__", "__main__", *(f"m{i}" for i in range(MAX_FOLDER_MODULES))]
    assert not list(find_wide_folders([module(f"appliance/a/{name}.py", "") for name in names], {}))


def test_an_exception_that_nothing_needs_is_found() -> None:
    (problem,) = find_long_files([], {"appliance/a.py": "was a table"})
    assert "remove it" in problem


def test_an_import_that_is_not_declared_is_found_by_its_distribution() -> None:
    modules = [
        module("appliance/a.py", "import pynvml\nfrom rich.table import Table\nimport os\nimport appliance.core\n")
    ]
    (problem,) = find_undeclared_imports(modules, ["rich"], {})
    assert "appliance/a.py imports pynvml" in problem
    assert not list(find_undeclared_imports(modules, ["Rich", "nvidia_ml.py"], {}))


def test_every_library_that_the_program_imports_is_declared_and_no_class_name_has_two_meanings() -> None:
    modules, exceptions = read_modules(ROOT), read_exceptions(PROJECT)
    declared = declared_distributions(PROJECT)
    assert not list(find_undeclared_imports(modules, declared, exceptions.undeclared_imports))
    assert not list(find_duplicate_classes(modules, exceptions.duplicate_classes))


def test_figures_count_what_they_say() -> None:
    body = "    x: dict[str, Any] = {}\n" * 40
    modules = [module("appliance/a.py", f"def f(y: Mapping[str, Any]):\n{body}def g():\n    return 1\n")]
    assert count_long_functions(modules) == 1
    assert count_untyped_mappings(modules) == 41
    figures = collect_figures([*modules, *TWICE], ROOT / "README.md")
    assert figures["files"] == "3"
    assert figures["class names with several meanings"] == "1"


def test_every_rule_is_part_of_the_check() -> None:
    wide = [module(f"appliance/a/m{i}.py", "") for i in range(MAX_FOLDER_MODULES + 1)]
    long = module("appliance/long.py", "import rich\n" * (MAX_FILE_LINES + 1))
    assert len(find_problems([*TWICE, *wide, long], Exceptions(), [])) == 4
