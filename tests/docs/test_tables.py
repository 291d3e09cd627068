"""What the documentation says of settings, commands, errors, metrics, headers and paths is what the code has now."""

import re
import tomllib
from pathlib import Path

import pytest

from appliance.config import NodeConfig, Policy
from appliance.node.supervise.launcher import build_engine_environment
from scripts.docs import DOCS, README, ROOT, TABLES, commands, error_classes, metrics, pages, render, settings_of

ALL = "\n".join(page.read_text("utf-8") for page in pages())
SOURCES = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "appliance").rglob("*.py")))


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_the_tables_made_from_the_code_are_up_to_date(path: Path) -> None:
    text = path.read_text("utf-8")
    assert render(text) == text, "run scripts/fix (or python -m scripts.docs): it rewrites the generated tables"


def test_every_table_that_can_be_made_stands_in_one_page() -> None:
    assert sorted(re.findall(r"<!-- generated: ([\w-]+) -->", ALL)) == sorted(TABLES)


def test_every_setting_is_documented_with_its_meaning() -> None:
    for model, where in ((NodeConfig, "configuration"), (Policy, "policy")):
        text = page(where)
        for prefix, name, field in settings_of(model):
            assert f"\n| `{name}` |" in text, f"{prefix}.{name}"
            assert field.description, f"{prefix}.{name} has no docstring"


def test_every_command_is_documented_with_what_it_does() -> None:
    known = commands()
    assert len(known) > 30
    for name, command in known:
        assert f"| `appliance {name}` | " in page("commands") and command.help, name


def test_every_error_code_is_documented_with_when_it_comes() -> None:
    for error in error_classes():
        assert re.search(rf"^\| `{error.code}` \| {error.status} \| \S", page("errors"), re.MULTILINE), error


def test_every_metric_is_documented() -> None:
    assert {name for name, *_ in metrics()} > {
        "appliance_requests_total",
        "appliance_jobs",
        "appliance_cascade_threshold",
    }
    for name, _, _, text in metrics():
        assert f"| `{name}` |" in page("operations") and text, name


def test_every_header_that_the_node_sends_or_reads_is_explained() -> None:
    headers = set(re.findall(r"x-appliance-[a-z-]+", SOURCES))
    assert len(headers) > 8
    assert not {name for name in headers if f"`{name}" not in ALL}
    assert not set(re.findall(r"`(x-appliance-[a-z-]+)", ALL)) - headers, "documented, and unknown to the code"


def test_every_path_is_listed() -> None:
    api = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "appliance" / "api").rglob("*.py")))
    routes = re.findall(r'Route\(\s*f?"(/[^"]+|\{one\}[^"]*)"', api)
    assert len(routes) > 30
    for route in routes:
        plain = re.sub(r"\{(name:path|decision_id)\}", "", route.replace("{one}", "...")).rstrip("/")
        assert plain in ALL, route


def test_every_environment_variable_that_the_program_reads_is_documented() -> None:
    read = set(re.findall(r'environ(?:ment)?(?:\.get\(|\[)"([A-Z_]+)"', SOURCES)) | set(
        re.findall(r'"(APPLIANCE_[A-Z]+)"', SOURCES)
    )
    assert {"APPLIANCE_HOME", "APPLIANCE_KEY"} <= read
    passed_on = set(build_engine_environment(dict.fromkeys(re.findall(r'"([A-Z][A-Z_]+)"', SOURCES), "x"), {}))
    text = page("operations")
    assert not {name for name in read | passed_on if f"`{name}`" not in text} - {
        "PYTHONUNBUFFERED",
        "APPLIANCE_ENGINE_OF",
    }


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:appliance|tests|scripts|model_configs|hardware)/[\w./-]*)`", ALL))
    assert "appliance/upstream/egress.py" in named
    made_up = {"model_configs/NAME.toml"}
    assert not {name for name in named if not (ROOT / name).exists()} - made_up


def test_every_script_that_is_named_exists() -> None:
    named = set(re.findall(r"scripts/([\w-]+)", ALL))
    assert {"serve", "test"} <= named
    folder = ROOT / "scripts"
    assert not {name for name in named if not (folder / name).exists() and not (folder / f"{name}.py").exists()}


def test_the_readme_is_short() -> None:
    text = README.read_bytes()
    assert len(text.splitlines()) <= 300 and len(text) <= 14_000


def test_the_licence_is_in_the_tree_and_named_for_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")[:200]
