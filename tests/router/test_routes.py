"""What a route may say beyond its targets: matches, scores, floors, ceilings, fallbacks, quotas, risk."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from appliance.config import RouteRule
from appliance.core import ONSITE, Profile, Request, Snapshot, Target
from appliance.errors import BudgetExceeded, Forbidden, Unavailable
from appliance.router.capacity.predictor import NOT_PREDICTED, Prediction
from appliance.router.routing.match import match_route, matches
from appliance.router.routing.rank import RankedTargets, TargetEstimate, rank_targets
from appliance.router.stats.windows import SlidingWindows, Window
from tests.router.scene import caller_of, engine_target, hosted_target, policy_of, request_of

LOCAL = engine_target(quality=0.3)
FAST = hosted_target(name="fast/mini", quality=0.6, region="EU")
BEST = hosted_target(name="best/maxi", quality=0.95, region="US")
TARGETS = (LOCAL, FAST, BEST)
PROFILE = Profile("chat", 0.3, "text", "interactive", "en", 10, 16)
REST = '\n[[routes]]\nname = "rest"\ntargets = ["onsite", "hosted"]\n'


def seconds(first: float, finish: float | None = None) -> Prediction:
    return Prediction(first, first if finish is None else finish, fits_kv=True, ready=True, reason="busy")


def outlooks(**given: TargetEstimate) -> Mapping[str, TargetEstimate]:
    expected = {
        LOCAL.name: TargetEstimate(seconds(0.1), 10, 5, usd=0.00001),
        FAST.name: TargetEstimate(replace(NOT_PREDICTED, first_byte_seconds=0.3), 10, 5, usd=0.001),
        BEST.name: TargetEstimate(replace(NOT_PREDICTED, first_byte_seconds=0.8), 10, 5, usd=0.02),
    }
    names = {"local": LOCAL.name, "fast": FAST.name, "best": BEST.name}
    return expected | {names[name]: outlook for name, outlook in given.items()}


def ranked(route: str, request: Request | None = None, rest: str = REST, **given: TargetEstimate) -> RankedTargets:
    text = f'[[routes]]\nname = "r"\nmatch = {{ tag = ["r"] }}\n{route}\n{rest}'
    request = request or request_of(tag="r")
    return rank_targets(request, PROFILE, policy_of(text), Snapshot(0.0, TARGETS), outlooks(**given))


def order(ranking: RankedTargets) -> list[str]:
    return [attempt.target.name for attempt in ranking.route.attempts]


# --- match


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ({"task": ("chat",)}, True),
        ({"task": ("code", "chat")}, True),
        ({"task": ("code",)}, False),
        ({"language": ("en",)}, True),
        ({"language": ("de",)}, False),
        ({"latency_class": ("interactive",)}, True),
        ({"latency_class": ("batch",)}, False),
        ({"risk": ("normal",)}, True),
        ({"risk": ("high",)}, False),
        ({"key": ("tester",)}, True),
        ({"tier": ("paid",)}, True),
        ({"tier": ("free",)}, False),
        ({"tag": ("hr",)}, True),
        ({"tag": ("it",)}, False),
        ({"header": {"X-Team": "sales"}}, True),
        ({"header": {"X-Team": "sales", "x-stage": "dev"}}, False),
        ({"output_tokens_at_least": 16}, True),
        ({"output_tokens_below": 16}, False),
        ({"prompt_tokens_at_least": 5, "prompt_tokens_below": 11}, True),
        ({"complexity_below": 0.3}, False),
        ({"endpoint": ("chat",), "format": ("text",), "tier": ("paid",), "tag": ("it",)}, False),
        ({}, True),
    ],
)
def test_every_field_of_a_match_must_hold(match: dict[str, Any], holds: bool) -> None:
    rule = RouteRule.model_validate({"name": "r", "targets": ("onsite",), "match": match})
    request = request_of(tag="hr", caller=caller_of(tier="paid"), headers={"x-team": "sales"})
    assert matches(rule.match, request, PROFILE) is holds


def test_tiers_may_take_different_routes() -> None:
    policy = policy_of(
        '[[routes]]\nname = "paid"\nmatch = { tier = ["paid"] }\ntargets = ["best/maxi"]\n'
        + REST.replace("rest", "free")
    )
    paid = match_route(request_of(caller=caller_of(tier="paid")), PROFILE, policy)
    assert (paid.name, match_route(request_of(), PROFILE, policy).name) == ("paid", "free")


def test_a_risk_class_that_a_route_does_not_allow_is_refused_and_told_what_would_be() -> None:
    policy = policy_of('[[routes]]\nname = "r"\ntargets = ["onsite"]\nallowed_risk = ["normal"]\n')
    assert match_route(request_of(), PROFILE, policy).name == "r"
    with pytest.raises(Forbidden, match="risk class 'high', and route 'r' is for normal alone"):
        match_route(request_of(), replace(PROFILE, risk="high"), policy)


# --- order by score


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("quality = 1", ["best/maxi", "fast/mini", "onsite/tiny"]),
        ("latency = 1", ["onsite/tiny", "fast/mini", "best/maxi"]),
        ("cost = 1", ["onsite/tiny", "fast/mini", "best/maxi"]),
        ("quality = 1, cost = 1", ["fast/mini", "onsite/tiny", "best/maxi"]),
        ("quality = 10, cost = 1, latency = 1", ["best/maxi", "fast/mini", "onsite/tiny"]),
    ],
)
def test_targets_may_be_chosen_by_weights(weights: str, expected: list[str]) -> None:
    ranking = ranked(f'targets = ["onsite", "hosted"]\nscore = {{ {weights} }}\nlatency_budget_seconds = 2.0')
    assert order(ranking) == expected
    assert ranking.route.attempts[0].reason.startswith("first of route r by score ")
    assert "quality" in ranking.route.attempts[0].reason and "USD" in ranking.route.attempts[0].reason


def test_a_score_never_widens_a_bound() -> None:
    ranking = ranked('targets = ["onsite", "hosted"]\nscore = { quality = 1 }', request_of(tag="r", residency=ONSITE))
    assert order(ranking) == ["onsite/tiny"]


# --- floors and ceilings


def test_a_quality_floor_leaves_out_what_declares_less_or_nothing() -> None:
    ranking = ranked('targets = ["onsite", "hosted"]\nmin_quality = 0.5')
    assert order(ranking) == ["fast/mini", "best/maxi"]
    assert ranking.route.excluded[0].reason == "declares quality 0.3, the floor is 0.5"
    refused = ranked('targets = ["onsite", "hosted"]\nmin_quality = 0.5', request_of(tag="r", residency=ONSITE))
    assert isinstance(refused.refusal, Unavailable) and "quality floor of route 'r'" in refused.refusal.message


def test_a_ceiling_for_the_request_leaves_out_what_could_cost_more() -> None:
    ranking = ranked('targets = ["hosted", "onsite"]\nmax_cost_usd = 0.01')
    assert order(ranking) == ["fast/mini", "onsite/tiny"]
    assert ranking.route.excluded[0].reason == "would cost up to 0.020000 USD, the ceiling is 0.010000 USD"
    refused = ranked('targets = ["best/maxi"]\nmax_cost_usd = 0.01')
    assert isinstance(refused.refusal, BudgetExceeded) and refused.refusal.status == 429


def test_a_ceiling_for_each_success_leaves_out_what_failed_too_often() -> None:
    dear = replace(outlooks()[FAST.name], usd_per_success=0.05)
    ranking = ranked('targets = ["fast/mini", "onsite"]\nmax_cost_per_success_usd = 0.01', fast=dear)
    assert order(ranking) == ["onsite/tiny"]
    assert "has cost 0.050000 USD an answer of late" in ranking.route.excluded[0].reason


def test_a_whole_answer_may_have_a_budget_of_its_own() -> None:
    slow = TargetEstimate(seconds(0.2, 9.0), 10, 5)
    text = 'targets = ["onsite", "hosted"]\nanswer_budget_seconds = 3.0'
    ranking = ranked(text, local=slow)
    assert order(ranking)[0] == "fast/mini"
    assert "would need 9.0 s for the whole answer, budget 3.0 s" in ranking.route.attempts[0].reason
    within = ranked('targets = ["onsite", "hosted"]', local=slow)
    assert order(within)[0] == "onsite/tiny"
    never = ranked('targets = ["onsite", "hosted"]\ntotal_seconds = 5.0\nlatency_budget_seconds = 2.0', local=slow)
    assert order(never)[0] == "fast/mini"
    assert "which may take 5.0 s" in never.route.attempts[0].reason


# --- fallback routes


def test_the_targets_of_a_fallback_route_come_after_a_routes_own() -> None:
    ranking = ranked('targets = ["onsite"]\nfallback = "rest"', rest=REST.replace('"hosted"]', '"best/maxi"]'))
    assert order(ranking) == ["onsite/tiny", "best/maxi"]
    assert ranking.route.attempts[1].reason == "fallback route rest of route r"


def test_a_fallback_routes_own_bound_holds_for_its_targets() -> None:
    rest = REST + 'residency = "region:EU"\n'
    ranking = ranked('targets = ["onsite"]\nresidency = "any"\nfallback = "rest"', rest=rest)
    assert order(ranking) == ["onsite/tiny", "fast/mini"]
    assert "region:EU by route 'rest'" in ranking.route.excluded[0].reason


def test_a_fallback_is_no_way_out_for_a_bound_request() -> None:
    ranking = ranked('targets = ["onsite"]\nfallback = "rest"', request_of(tag="r", residency=ONSITE))
    assert order(ranking) == ["onsite/tiny"]


# --- escalation targets


def test_escalations_are_those_that_are_allowed_and_able() -> None:
    text = 'targets = ["onsite"]\nescalation = { below_confidence = 0.7, max_rate = 0.2, to = ["best/maxi", "hosted"] }'
    assert [one.target.name for one in ranked(text).route.escalations] == ["best/maxi", "fast/mini"]
    assert ranked(text, request_of(tag="r", residency=ONSITE)).route.escalations == ()
    assert ranked(text, request_of(tag="r", model="tiny")).route.escalations == (), "a pinned model is not replaced"
    blocked = replace(outlooks()[BEST.name], blocked_seconds=3.0)
    assert [one.target.name for one in ranked(text, best=blocked).route.escalations] == ["fast/mini"]


# --- quotas and windows of time


def test_a_quota_is_a_share_of_all_requests_and_passes_the_others_on() -> None:
    policy = policy_of(f'[[routes]]\nname = "some"\ntargets = ["hosted"]\nquota = 0.25\n{REST}')
    windows, taken = SlidingWindows(), []
    for number in range(40):
        over = windows.over_quota(policy.routes, float(number))
        rule = match_route(request_of(), PROFILE, policy, over)
        windows.record_request(rule.name, float(number))
        taken.append(rule.name)
    assert taken.count("some") == 10 and taken[3] == "some"
    assert all(taken[: end + 1].count("some") <= 0.25 * (end + 1) for end in range(40)), "never more, at any moment"


def test_beyond_its_quota_a_route_may_refuse() -> None:
    policy = policy_of('[[routes]]\nname = "r"\ntargets = ["hosted"]\nquota = 0.5\nbeyond_quota = "refuse"\n')
    with pytest.raises(BudgetExceeded, match="at most 50% of all requests") as caught:
        match_route(request_of(), PROFILE, policy, {"r"})
    assert caught.value.retry_after_seconds


def test_a_window_forgets() -> None:
    window = Window(60.0)
    for second in range(120):
        window.add(float(second), 1, 2)
    first, twice = window.sums(119.0)
    assert (first, twice) == (60, 120)
    assert window.sums(1000.0) == (0.0, 0.0)


def test_the_cost_of_a_success_counts_failures_and_waits_for_enough_of_them() -> None:
    windows = SlidingWindows()
    for number in range(20):
        assert windows.usd_per_success("r", "t", 1.0) is None
        windows.record_cost("r", "t", 0.01, answered=number % 4 == 0, now=1.0)
    windows.record_cost("r", "t", None, answered=False, now=1.0)
    assert windows.usd_per_success("r", "t", 1.0) == pytest.approx(0.04)
    assert windows.usd_per_success("other", "t", 1.0) is None
    assert windows.usd_per_success("r", "t", 4000.0) is None, "an hour later it may try again"


def test_a_target_without_a_merit_keeps_the_routes_order() -> None:
    alone: tuple[Target, ...] = (LOCAL,)
    policy = policy_of('[[routes]]\nname = "r"\ntargets = ["onsite"]\nscore = { cost = 1 }\n')
    ranking = rank_targets(request_of(), PROFILE, policy, Snapshot(0.0, alone), outlooks())
    assert ranking.route.attempts[0].reason == "first choice of route r"
