"""Configuration and policy: what is accepted, and that every mistake names file, line and field."""

from pathlib import Path

import pytest

from appliance.config import Provider, load_config, load_policy, parse_policy, read_secret
from appliance.errors import ConfigError

GOOD = """\
[defaults]
residency = "any"

[[routes]]
name = "decide"
match = { task = ["classification"] }
targets = ["onsite"]

[[routes]]
name = "rest"
targets = ["onsite", "hosted"]
latency_budget_seconds = 3
"""


def test_the_policy_that_comes_along_is_valid_and_ends_with_a_route_for_everything() -> None:
    policy = load_policy(None, targets=[])
    assert policy.routes[-1].match == type(policy.routes[-1].match)()
    assert policy.version.startswith("sha256:")


def test_equal_texts_have_equal_versions_and_others_have_not() -> None:
    assert parse_policy(GOOD, "a.toml").version == parse_policy(GOOD, "b.toml").version
    assert parse_policy(GOOD, "a.toml").version != parse_policy(GOOD + "# x\n", "a.toml").version


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "words"),
    [
        ("latency_budget_seconds", "latency_budget_second", 12, "routes[1].latency_budget_second", "known are"),
        ("seconds = 3", "seconds = -3", 12, "routes[1].latency_budget_seconds", "greater than 0 (it is -3)"),
        ("seconds = 3", 'seconds = "3"', 12, "routes[1].latency_budget_seconds", "valid number (it is '3')"),
        ('"any"', '"europe"', 2, "defaults.residency", "region:XX"),
        ('"classification"', '"clasification"', 6, "routes[0].match.task[0]", "'clasification'"),
        ('["onsite"]', "[]", 7, "routes[0].targets", "at least 1"),
        ('"onsite", "hosted"', '"onsite", "openai/gpt"', 11, "routes[1].targets", "'openai/gpt' of route 'rest'"),
        ('name = "rest"', 'name = "decide"', 10, "routes[1].name", "'decide' is defined twice"),
        ('match = { task = ["classification"] }', "", 9, "routes[1].match", "can never be used"),
        ("match = { task", "match = { complexity_below = 0.2, complexity_at_least = 0.3, task", 6, None, "no request"),
        ("[defaults]", "[defaults", 1, None, "is not TOML"),
    ],
)
def test_a_mistake_in_a_policy_names_file_line_and_field(
    old: str, new: str, line: int | None, field: str | None, words: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        parse_policy(GOOD.replace(old, new, 1), "policy.toml", targets=["openai/mini"])
    assert words in str(caught.value)
    assert caught.value.file == "policy.toml"
    assert caught.value.line == line
    if field is not None:
        assert caught.value.field == field


def test_the_last_route_must_take_everything() -> None:
    with pytest.raises(ConfigError, match="end with a route for everything else"):
        parse_policy(GOOD + 'match = { task = ["code"] }\n', "policy.toml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot read it: No such file"):
        load_config(Path("nowhere.toml"))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


PROVIDER = """\
[[providers]]
name = "openai"
base_url = "https://api.example.com/v1"
key_env = "OPENAI_API_KEY"
models = [{ name = "mini", input_usd = 0.1, output_usd = 0.4 }]
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", output_usd = 0.4", "", "unknown is not free"),
        ('"https://api.example.com/v1"', '"ftp://x"', "String should match pattern"),
        ('"openai"', '"onsite"', "this node's own engines"),
        ("input_usd = 0.1", "input_usd = -1", "greater than or equal to 0"),
        ('key_env = "OPENAI_API_KEY"', 'key_env = "A"\nkey_file = "b"', "keep one"),
        ('name = "openai"', 'name = "openai"\nregion = "europe"', "String should match pattern"),
    ],
)
def test_a_mistake_in_a_provider_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text(PROVIDER.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value)


def test_a_provider_defined_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text(PROVIDER + PROVIDER)
    with pytest.raises(ConfigError, match="provider 'openai' is defined twice"):
        load_config(path)


def provider(**fields: str) -> Provider:
    rows = ({"name": "mini", "input_usd": 1.0, "output_usd": 1.0},)
    return Provider.model_validate({"name": "openai", "base_url": "https://h/v1", "models": rows, **fields})


def test_a_missing_key_names_the_variable_and_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="environment variable SOME_KEY is empty"):
        read_secret(provider(key_env="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", " abc \n")
    assert read_secret(provider(key_env="SOME_KEY")) == "abc"


def test_a_key_file_is_read_and_a_missing_or_empty_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(provider(key_file=str(path)))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_secret(provider(key_file=str(path)))
    path.write_text("secret\n")
    assert read_secret(provider(key_file=str(path))) == "secret"
