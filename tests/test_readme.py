"""The README tells what the code does now."""

import re

from scripts.readme import README, ROOT, render

TEXT = README.read_text()


def test_the_parts_made_from_the_code_are_up_to_date() -> None:
    assert render(TEXT) == TEXT, "run scripts/fix: it rewrites the generated parts of README.md"


def test_every_header_that_the_node_sends_is_explained() -> None:
    sent = {
        name
        for path in (ROOT / "appliance").rglob("*.py")
        for name in re.findall(r"x-appliance-[a-z-]+", path.read_text())
    }
    assert sent
    assert not {name for name in sent if f"`{name}" not in TEXT}


def test_every_endpoint_is_listed() -> None:
    routes = re.findall(r'Route\("(/[^"]+)"', (ROOT / "appliance/api/app.py").read_text())
    assert len(routes) > 10
    for route in routes:
        plain = route.replace("{name:path}", "").replace("{decision_id}", "").rstrip("/")
        assert plain in TEXT, route


def test_every_script_that_is_named_exists() -> None:
    named = set(re.findall(r"scripts/([\w-]+)", TEXT))
    assert {"serve", "test"} <= named
    assert not {
        name
        for name in named
        if not (ROOT / "scripts" / name).exists() and not (ROOT / "scripts" / f"{name}.py").exists()
    }
