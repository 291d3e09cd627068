"""appliance policy"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from appliance.cli import app

RUN = CliRunner()

CONFIG = """
[[providers]]
name = "cloud"
region = "EU"
base_url = "https://cloud.example.com/v1"
models = [{ name = "big", input_usd = 2.0, output_usd = 8.0, quality = 0.9 }]

[[keys]]
name = "hr"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
residency = "onsite"
"""

POLICY = """
[[routes]]
name = "complex"
match = { complexity_at_least = 0.7 }
targets = ["hosted", "onsite"]
max_cost_usd = 0.5

[[routes]]
name = "sales"
match = { header = { x-team = "sales" } }
targets = ["onsite"]
escalation = { below_confidence = 0.5, max_rate = 0.1, to = ["cloud/big"] }

[[routes]]
name = "rest"
targets = ["onsite", "hosted"]
"""


def run(*arguments: object) -> Result:
    return RUN.invoke(app, ["policy", *(str(argument) for argument in arguments)])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "appliance.toml").write_text(CONFIG)
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path


def explain(home: Path, content: str, *arguments: object) -> Result:
    body = home / "body.json"
    body.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    return run("explain", home / "policy.toml", body, "--config", home / "appliance.toml", *arguments)


def test_a_good_policy_is_said_to_be_valid(home: Path) -> None:
    done = run("check", home / "policy.toml", "--config", home / "appliance.toml")
    assert done.exit_code == 0 and "valid, 3 routes, version sha256:" in done.stdout


def test_a_mistake_is_named_with_file_line_and_field(home: Path) -> None:
    (home / "policy.toml").write_text(POLICY.replace('"cloud/big"', '"cloud/small"'))
    done = run("check", home / "policy.toml", "--config", home / "appliance.toml")
    assert done.exit_code == 1
    assert "policy.toml:12: routes[1].escalation: target 'cloud/small'" in done.stderr


def test_a_policy_can_be_shown_with_every_default(home: Path) -> None:
    assert run("show", home / "policy.toml").stdout.strip() == POLICY.strip()
    shown = json.loads(run("show", home / "policy.toml", "--json").stdout)
    assert shown["defaults"]["max_attempts"] == 3 and shown["routes"][0]["stage"] == "managed"


def test_a_difference_is_told_field_by_field(home: Path) -> None:
    new = POLICY.replace("0.7", "0.8").replace("max_cost_usd = 0.5\n", "").replace('name = "sales"', 'name = "shop"')
    new = new.replace('targets = ["onsite", "hosted"]', 'targets = ["onsite"]\nquota = 0.5\nbeyond_quota = "refuse"')
    (home / "new.toml").write_text("[defaults]\nmax_attempts = 2\n" + new)
    lines = run("diff", home / "policy.toml", home / "new.toml").stdout.splitlines()
    assert "[defaults] max_attempts was 3, and is 2" in lines
    assert "route 'sales' is gone" in lines
    assert any(line.startswith("route 'shop' is new: { stage = \"managed\", match = { header = {") for line in lines)
    assert "route 'complex': match.complexity_at_least was 0.7, and is 0.8" in lines
    assert "route 'complex': max_cost_usd is no longer set (it was 0.5)" in lines
    assert 'route \'rest\': targets was ["onsite", "hosted"], and is ["onsite"]' in lines
    assert "route 'rest': quota is now 0.5 (it was not set)" in lines


def test_routes_that_change_places_are_told_and_equal_policies_too(home: Path) -> None:
    first, second, third, fourth = POLICY.split("\n[[routes]]")
    (home / "new.toml").write_text("\n[[routes]]".join((first, third, second, fourth)))
    told = run("diff", home / "policy.toml", home / "new.toml").stdout
    assert told.strip() == "the order of routes was complex, sales, rest, and is sales, complex, rest"
    assert run("diff", home / "policy.toml", home / "policy.toml").stdout.strip() == "they say the same"


def test_explain_names_the_route_the_order_and_the_reasons(home: Path) -> None:
    told = explain(home, "Prove that 2 is prime").stdout
    assert "route      complex (policy sha256:" in told
    assert "attempt 1  cloud/big: complex:" in told
    assert "attempt 2  onsite/smollm2-135m-instruct: second choice of route complex" in told


def test_explain_takes_the_engines_for_what_it_is_told(home: Path) -> None:
    assert "attempt 1  onsite/smollm2" in explain(home, "hello").stdout
    assert "attempt 1  cloud/big: overflow: onsite/smollm2" in explain(home, "hello", "--local", "busy").stdout
    assert "attempt 1  cloud/big: overflow:" in explain(home, "hello", "--local", "down").stdout
    assert "it must be one of ready, busy, down" in explain(home, "hello", "--local", "gone").stderr


def test_explain_knows_keys_and_headers(home: Path) -> None:
    bound = explain(home, "Prove that 2 is prime", "--key", "hr").stdout
    assert "residency  onsite: onsite by key 'hr'" in bound and "left out   cloud/big: outside" in bound
    sales = json.loads(explain(home, "hello", "--header", "x-team=sales", "--json").stdout)
    assert (sales["route"], sales["escalations"]) == ("sales", ["cloud/big"])
    assert sales["profile"]["task"] and sales["refusal"] is None


def test_explain_says_what_would_be_refused(home: Path) -> None:
    body = home / "body.json"
    body.write_text(json.dumps({"model": "cloud/big", "messages": [{"role": "user", "content": "hi"}]}))
    command = ("explain", home / "policy.toml", body, "--config", home / "appliance.toml")
    assert "refused    403 residency_bound" in run(*command, "--key", "hr").stdout
    body.write_text(json.dumps({"model": "gpt-99", "messages": [{"role": "user", "content": "hi"}]}))
    assert "model 'gpt-99' does not exist here" in run(*command).stderr
    body.write_text("{")
    assert "cannot be read as JSON" in run(*command).stderr
    body.write_text(json.dumps({"messages": []}))
    assert "messages is empty" in run(*command).stderr


def test_explain_reads_the_body_of_every_endpoint(home: Path) -> None:
    body = home / "body.json"
    question = {"type": "predicate", "instructions": "Is it spam?"}
    body.write_text(json.dumps({"endpoint": "decisions", "input": "Buy now", "questions": [question]}))
    done = run("explain", home / "policy.toml", body, "--config", home / "appliance.toml")
    assert "classification: the decisions endpoint" in done.stdout


def test_explaining_searches_the_request_where_the_policy_does(home: Path) -> None:
    (home / "policy.toml").write_text('[residency]\ncontent = "personal_data"\n' + POLICY)
    assert "onsite by its content (e-mail address)" in explain(home, "Write to jane@example.com").stdout
    assert "nothing binds it" in explain(home, "Write to nobody").stdout


@pytest.mark.skipif(find_spec("presidio_analyzer") is not None, reason="presidio-analyzer is installed")
def test_a_detector_that_is_not_installed_is_a_mistake_of_the_policy(home: Path) -> None:
    (home / "policy.toml").write_text('[residency]\ncontent = "personal_data"\ndetector = "presidio"\n' + POLICY)
    done = run("check", home / "policy.toml", "--config", home / "appliance.toml")
    assert done.exit_code == 1
    assert "appliance[presidio]" in done.stderr
