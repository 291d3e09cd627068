"""Policies whose every field is right and which are wrong all the same: each is refused with its line and field."""

import pytest

from appliance.config import list_provider_targets, load_policy, parse_policy
from appliance.config.settings import NodeConfig
from appliance.core import ONSITE, Target
from appliance.errors import ConfigError

GOOD = """\
[defaults]
latency_budget_seconds = 2.0
total_seconds = 60.0

[[routes]]
name = "decide"
match = { task = ["classification"], complexity_below = 0.5 }
targets = ["onsite", "eu/mini"]
fallback = "rest"

[[routes]]
name = "sales"
match = { header = { "X-Team" = "sales" }, tier = ["paid"] }
targets = ["hosted"]
score = { quality = 2, cost = 1 }
min_quality = 0.6
escalation = { below_confidence = 0.7, max_rate = 0.1, to = ["us/maxi"] }

[[routes]]
name = "rest"
targets = ["onsite", "hosted"]
residency = "region:EU"
quota = 0.5
beyond_quota = "refuse"
"""


def configured() -> tuple[Target, ...]:
    def provider(name: str, region: str, model: str, quality: float) -> dict[str, object]:
        row = {"name": model, "input_usd": 0.1, "output_usd": 0.4, "quality": quality}
        return {"name": name, "region": region, "base_url": f"https://{name}.example.com/v1", "models": (row,)}

    rows = (provider("eu", "EU", "mini", 0.5), provider("us", "US", "maxi", 0.9))
    return list_provider_targets(NodeConfig.model_validate({"providers": rows}))


def test_the_policy_that_the_mistakes_are_made_in_is_right() -> None:
    policy = parse_policy(GOOD, "policy.toml", [*configured(), "onsite/tiny"])
    assert policy.routes[1].match.header == {"x-team": "sales"}, "headers have no case"
    assert policy.capacity.reserved_for_bound == 0.1


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "words"),
    [
        ('"eu/mini"]', '"eu/maxi"]', 8, "routes[0].targets", "target 'eu/maxi' of route 'decide' does not exist"),
        ('to = ["us/maxi"]', 'to = ["us/mini"]', 17, "routes[1].escalation", "target 'us/mini'"),
        ('fallback = "rest"', 'fallback = "best"', 9, "routes[0].fallback", "route 'best' does not exist"),
        ('fallback = "rest"', 'fallback = "decide"', 9, "routes[0].fallback", "circle: decide -> decide"),
        (
            'beyond_quota = "refuse"',
            'beyond_quota = "refuse"\nfallback = "decide"',
            9,
            "routes[0].fallback",
            "circle: decide -> rest -> decide",
        ),
        (
            'match = { header = { "X-Team" = "sales" }, tier = ["paid"] }',
            'match = { task = ["classification"], complexity_below = 0.4, tier = ["paid"] }',
            13,
            "routes[1].match",
            "route 'decide' matches all that route 'sales' matches",
        ),
        ('"region:EU"', '"region:JP"', None, None, ""),
        ('targets = ["hosted"]', 'targets = ["hosted"]\nresidency = "region:JP"', 15, "routes[1].residency", "nobody"),
        ('targets = ["hosted"]', 'targets = ["hosted"]\nresidency = "onsite"', 15, "routes[1].residency", "all hosted"),
        ("latency_budget_seconds = 2.0", "latency_budget_seconds = 90", 3, "defaults.total_seconds", "only 60 s"),
        ('fallback = "rest"', "latency_budget_seconds = 90", 9, "routes[0].latency_budget_seconds", "only 60 s"),
        ('fallback = "rest"', "answer_budget_seconds = 90", 9, "routes[0].answer_budget_seconds", "only 60 s"),
        ('fallback = "rest"', "max_cost_usd = -0.1", 9, "routes[0].max_cost_usd", "greater than 0 (it is -0.1)"),
        ('fallback = "rest"', 'latency_budget_seconds = "2s"', 9, "routes[0].latency_budget_seconds", "(it is '2s')"),
        ('fallback = "rest"', "latency_budget_ms = 90", 9, "routes[0].latency_budget_ms", "mean latency_budget_sec"),
        ('fallback = "rest"', "score = { speed = 1 }", 9, "routes[0].score.speed", "known are cost, latency, quality"),
        ('fallback = "rest"', "score = { cost = 0 }", 9, "routes[0].score", "every weight is 0"),
        ('fallback = "rest"', "quota = 1.5", 9, "routes[0].quota", "less than or equal to 1"),
        ('fallback = "rest"', 'stage = "retired"', 9, "routes[0].stage", "'managed' or 'deprecated'"),
        ('fallback = "rest"', 'degrade = [{ step = "static" }]', 9, "routes[0].degrade[0]", "a static step has text"),
        ('fallback = "rest"', 'degrade = [{ step = "constrained" }]', 9, "routes[0].degrade[0]", "needs max_output"),
        (
            'fallback = "rest"',
            'degrade = [{ step = "static", text = "x" }, { step = "reduced_scope" }]',
            9,
            "routes[0].degrade[1]",
            "can never be taken",
        ),
        ("min_quality = 0.6", "min_quality = 0.95", 16, "routes[1].min_quality", "us/maxi 0.9"),
        ('beyond_quota = "refuse"', "", 23, "routes[2].quota", "has no next one"),
        ('"X-Team" = "sales"', '"Authorization" = "x"', 13, "routes[1].match.header", "carries a secret"),
        ('tier = ["paid"]', "tier = []", 13, "routes[1].match.tier", "an empty list matches nothing"),
    ],
)
def test_a_contradiction_names_line_and_field(
    old: str, new: str, line: int | None, field: str | None, words: str
) -> None:
    assert old in GOOD
    targets: list[Target | str] = [*configured(), "onsite/tiny"]
    if line is None:  # the site is inside every region
        parse_policy(GOOD.replace(old, new, 1), "policy.toml", targets)
        return
    with pytest.raises(ConfigError) as caught:
        parse_policy(GOOD.replace(old, new, 1), "policy.toml", targets)
    assert words in str(caught.value)
    assert (caught.value.file, caught.value.line, caught.value.field) == ("policy.toml", line, field)


def test_a_route_behind_one_with_a_quota_can_be_reached() -> None:
    text = '[[routes]]\nname = "some"\ntargets = ["hosted"]\nquota = 0.2\n'
    text += '[[routes]]\nname = "rest"\ntargets = ["onsite"]\n'
    assert [route.name for route in parse_policy(text, "p.toml").routes] == ["some", "rest"]


def test_a_score_by_quality_needs_targets_that_declare_theirs() -> None:
    (eu, us) = configured()
    text = '[[routes]]\nname = "r"\nscore = { quality = 1 }\ntargets = ["hosted"]\n'
    parse_policy(text, "p.toml", [eu, us])
    bare = NodeConfig.model_validate(
        {
            "providers": (
                {
                    "name": "eu",
                    "base_url": "https://e/v1",
                    "models": ({"name": "m", "input_usd": 1.0, "output_usd": 1.0},),
                },
            )
        }
    )
    with pytest.raises(ConfigError, match="eu/m declares none: set quality on its model"):
        parse_policy(text, "p.toml", list_provider_targets(bare))


def test_the_policy_that_comes_along_fits_every_set_of_targets() -> None:
    sets: list[list[Target | str]] = [[], ["onsite/tiny"], [*configured()], [*configured(), "onsite/tiny"]]
    for targets in sets:
        assert load_policy(None, targets).version


def test_personal_data_binds_to_somewhere_and_every_route_may_say_otherwise() -> None:
    with pytest.raises(ConfigError, match=r"policy.toml:3: residency.bound: a bound of 'any' binds nothing"):
        parse_policy('[residency]\ncontent = "personal_data"\nbound = "any"\n' + GOOD, "policy.toml")
    policy = parse_policy('[residency]\nbound = "region:EU"\n' + GOOD, "policy.toml")
    assert not policy.searches_content
    policy = parse_policy(GOOD.replace('name = "sales"', 'name = "sales"\ncontent = "personal_data"'), "policy.toml")
    assert policy.searches_content
    assert [policy.content_bound(route) for route in policy.routes] == [None, ONSITE, None]
    with pytest.raises(ConfigError, match=r"residency\.kinds\[0\]"):
        parse_policy('[residency]\nkinds = ["e-mail"]\n' + GOOD, "policy.toml")


CASCADE = """\
[[routes]]
name = "intents"
targets = ["classifier/mail", "onsite"]
cascade = { bound = 0.05, learn_after = 100 }
keep_texts = true
"""


def test_a_route_may_begin_with_a_classifier_that_was_not_trained_yet() -> None:
    route = parse_policy(CASCADE, "policy.toml", ["onsite/tiny"]).routes[0]
    assert route.cascade is not None and route.cascade.bound == 0.05


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"classifier/mail", "onsite"', '"onsite", "classifier/mail"', "begins with one classifier"),
        ('"classifier/mail", "onsite"', '"classifier/mail"', "begins with one classifier"),
        ('"onsite"]', '"onsite", "classifier/other"]', "begins with one classifier"),
        ("keep_texts = true", "", "set keep_texts = true"),
        ("cascade = { bound = 0.05, learn_after = 100 }", "", "give the route one"),
        ("keep_texts = true", "keep_texts = true\nscore = { cost = 1 }", "leave score out"),
        (
            "keep_texts = true",
            'keep_texts = true\nescalation = { below_confidence = 0.7, max_rate = 1, to = ["onsite"] }',
            "keep one of the two",
        ),
        ("0.05", "1.0", "less than 1"),
        ("100", "5", "greater than or equal to 20"),
    ],
)
def test_what_is_wrong_with_a_cascade_is_named(old: str, new: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_policy(CASCADE.replace(old, new), "policy.toml", ["onsite/tiny"])
