"""The policy as a table: which route, which targets, which order, and the reason each time."""

from typing import Any

import pytest

from appliance.core import ANYWHERE, ONSITE, Profile, Request, Residency, Snapshot, Target
from appliance.errors import ContextTooLong, Forbidden, ResidencyRefused, Unavailable, UnknownModel, Unsupported
from appliance.router.capacity.predictor import NOT_PREDICTED, Prediction
from appliance.router.routing.match import list_visible_targets
from appliance.router.routing.rank import RankedTargets, TargetEstimate, rank_targets
from tests.router.scene import LOCAL_FIRST, caller_of, engine_target, hosted_target, policy_of, request_of

LOCAL, HOSTED = engine_target(), hosted_target()
READY = Prediction(0.1, 1.0, fits_kv=True, ready=True, reason="idle")
SLOW = Prediction(3.2, 9.0, fits_kv=True, ready=True, reason="busy")
STARTING = Prediction(0.0, 0.0, fits_kv=False, ready=False, reason="engine starting", can_enter=False)


def outlook(prediction: Prediction = READY, *, tokens: int = 10, blocked: float | None = None) -> TargetEstimate:
    return TargetEstimate(prediction, tokens, tokens // 2, blocked)


def ranked(
    request: Request | None = None,
    *,
    targets: tuple[Target, ...] = (LOCAL, HOSTED),
    complexity: float = 0.3,
    policy: str = LOCAL_FIRST,
    **outlooks: TargetEstimate,
) -> RankedTargets:
    made = Profile("chat", complexity, "text", "interactive", None, 10, 16)
    expected = {target.name: outlook(NOT_PREDICTED if target.provider else READY) for target in targets}
    expected |= {
        {"local": LOCAL.name, "hosted": HOSTED.name}.get(name, name): given for name, given in outlooks.items()
    }
    return rank_targets(request or request_of(), made, policy_of(policy), Snapshot(0.0, targets), expected)


def order(ranking: RankedTargets) -> list[str]:
    return [attempt.target.name for attempt in ranking.route.attempts]


def test_the_route_gives_the_order_and_every_place_its_reason() -> None:
    ranking = ranked()
    assert order(ranking) == ["onsite/tiny", "cloud/big"]
    reasons = [attempt.reason for attempt in ranking.route.attempts]
    assert reasons == ["first choice of route general", "second choice of route general"]
    assert ranking.refusal is None and ranking.route.policy_version.startswith("sha256:")


def test_a_complex_request_goes_out_first_and_says_why() -> None:
    ranking = ranked(complexity=0.82)
    assert order(ranking) == ["cloud/big", "onsite/tiny"]
    assert ranking.route.attempts[0].reason == "complex: 0.82 is at least 0.70 (route complex)"


def test_a_complex_request_without_a_provider_is_answered_here() -> None:
    assert order(ranked(complexity=0.9, targets=(LOCAL,))) == ["onsite/tiny"]


def test_a_local_engine_that_cannot_begin_in_time_is_passed_over_with_both_figures() -> None:
    ranking = ranked(local=outlook(SLOW))
    assert order(ranking) == ["cloud/big", "onsite/tiny"]
    assert ranking.route.attempts[0].reason == (
        "overflow: onsite/tiny would need 3.2 s to the first token, budget 2.0 s"
    )


def test_a_bound_request_waits_for_a_slow_engine_and_never_gets_another() -> None:
    ranking = ranked(request_of(residency=ONSITE), local=outlook(SLOW))
    assert order(ranking) == ["onsite/tiny"]
    (excluded,) = ranking.route.excluded
    assert excluded.target == "cloud/big" and "residency bound" in excluded.reason


def test_an_engine_that_is_not_up_is_waited_for_only_where_nothing_else_is_left() -> None:
    unbound = ranked(local=outlook(STARTING))
    assert order(unbound) == ["cloud/big"]
    assert unbound.route.attempts[0].reason == "overflow: onsite/tiny engine starting"
    bound = ranked(request_of(residency=ONSITE), local=outlook(STARTING))
    assert order(bound) == ["onsite/tiny"]
    assert bound.route.attempts[0].reason == "waits for onsite/tiny: engine starting"


def test_a_target_that_keeps_failing_is_left_out() -> None:
    ranking = ranked(hosted=outlook(NOT_PREDICTED, blocked=12.0), complexity=0.9)
    assert order(ranking) == ["onsite/tiny"]
    assert ranking.route.excluded[0].reason == "it kept failing; tried again in 12 s"


def test_with_every_target_failing_the_answer_says_when_to_come_back() -> None:
    ranking = ranked(targets=(HOSTED,), hosted=outlook(NOT_PREDICTED, blocked=12.0))
    assert order(ranking) == []
    assert isinstance(ranking.refusal, Unavailable) and ranking.refusal.retry_after_seconds == 12.0


def test_what_a_target_cannot_do_keeps_it_out() -> None:
    ranking = ranked(request_of(needs=frozenset({"chat", "tools"})))
    assert order(ranking) == ["cloud/big"]
    assert ranking.route.excluded[0].reason == "cannot do tools"
    refused = ranked(request_of(needs=frozenset({"tools"}), residency=ONSITE))
    assert order(refused) == [] and isinstance(refused.refusal, Unsupported)


def test_a_prompt_that_is_too_long_everywhere_is_refused_with_both_numbers() -> None:
    refused = ranked(request_of(residency=ONSITE), local=outlook(tokens=9000))
    assert order(refused) == []
    assert isinstance(refused.refusal, ContextTooLong)
    assert "9000" in refused.refusal.message and "4096" in refused.refusal.message


def test_a_prompt_that_is_too_long_here_goes_where_it_fits() -> None:
    assert order(ranked(local=outlook(tokens=9000))) == ["cloud/big"]


def test_a_prompt_that_may_be_too_long_is_not_refused_on_an_estimate() -> None:
    ranking = ranked(request_of(residency=ONSITE), local=outlook(tokens=5000))
    assert order(ranking) == ["onsite/tiny"]
    assert order(ranked(local=outlook(tokens=5000))) == ["cloud/big", "onsite/tiny"]


@pytest.mark.parametrize("model", ["onsite/tiny", "tiny"])
def test_a_pinned_model_is_the_only_one(model: str) -> None:
    ranking = ranked(request_of(model=model), local=outlook(SLOW))
    assert order(ranking) == ["onsite/tiny"] and ranking.route.pinned


def test_a_bare_name_means_every_place_that_has_the_model() -> None:
    also = hosted_target(name="cloud/tiny")
    request = request_of(model="tiny")
    assert order(ranked(request, targets=(LOCAL, HOSTED, also))) == ["onsite/tiny", "cloud/tiny"]


def test_pitfall_6_a_model_that_exists_here_and_outside_keeps_only_its_place_here_for_a_bound_request() -> None:
    also = hosted_target(name="cloud/tiny")
    request = request_of(model="tiny", residency=ONSITE)
    assert order(ranked(request, targets=(also, LOCAL))) == ["onsite/tiny"]


def test_an_unknown_model_is_refused_with_the_names_that_exist() -> None:
    refused = ranked(request_of(model="gpt-99"))
    assert order(refused) == [] and isinstance(refused.refusal, UnknownModel)
    assert refused.refusal.status == 404 and refused.refusal.param == "model"
    for words in ("'gpt-99'", "onsite/tiny", "cloud/big"):
        assert words in refused.refusal.message


def test_an_unknown_model_tells_a_bound_key_of_no_hosted_one() -> None:
    refused = ranked(request_of(model="gpt-99", caller=caller_of(residency=ONSITE)))
    assert refused.refusal is not None and "onsite/tiny" in refused.refusal.message
    assert "big" not in refused.refusal.message


@pytest.mark.parametrize(
    "fields",
    [{"residency": ONSITE}, {"caller": caller_of(residency=ONSITE)}, {"residency": Residency("region", "EU")}],
)
def test_a_bound_request_that_pins_a_hosted_model_is_refused_and_told_why(fields: dict[str, Any]) -> None:
    refused = ranked(request_of(model="cloud/big", **fields))
    assert order(refused) == []
    assert isinstance(refused.refusal, ResidencyRefused) and refused.refusal.status == 403
    assert "cloud/big" in refused.refusal.message and str(refused.route.residency) in refused.refusal.message


def test_a_region_bound_request_reaches_only_its_region_and_the_site() -> None:
    eu = hosted_target(name="eu/big", region="EU")
    us = hosted_target(name="us/big", region="US")
    request = request_of(residency=Residency("region", "EU"))
    ranking = ranked(request, targets=(us, eu, HOSTED, LOCAL), complexity=0.9)
    assert order(ranking) == ["eu/big", "onsite/tiny"]


def test_a_route_may_bind_and_the_first_match_counts() -> None:
    policy = '[[routes]]\nname = "hr"\nmatch = { tag = ["hr"] }\ntargets = ["hosted", "onsite"]\nresidency = "onsite"\n'
    policy += '[[routes]]\nname = "rest"\ntargets = ["hosted"]\n'
    bound = ranked(request_of(tag="hr"), policy=policy)
    assert (bound.route.name, bound.route.residency, order(bound)) == ("hr", ONSITE, ["onsite/tiny"])
    free = ranked(policy=policy)
    assert (free.route.name, free.route.residency, order(free)) == ("rest", ANYWHERE, ["cloud/big"])


def test_a_key_gets_the_first_matching_route_that_it_may_use() -> None:
    keyed = request_of(caller=caller_of(routes=frozenset({"general"})))
    assert ranked(keyed, complexity=0.9).route.name == "general"
    with pytest.raises(Forbidden, match="may use complex"):
        ranked(request_of(caller=caller_of(routes=frozenset({"complex"}))), complexity=0.1)


def test_an_empty_set_stays_empty() -> None:
    refused = ranked(request_of(residency=ONSITE), targets=(HOSTED,))
    assert order(refused) == [] and isinstance(refused.refusal, ResidencyRefused)
    nothing = ranked(targets=())
    assert order(nothing) == [] and isinstance(nothing.refusal, Unavailable)


def test_a_target_named_twice_stands_once() -> None:
    policy = '[[routes]]\nname = "r"\ntargets = ["cloud/big", "onsite", "hosted", "onsite/tiny"]\n'
    assert order(ranked(policy=policy)) == ["cloud/big", "onsite/tiny"]


def test_a_bound_key_does_not_see_hosted_models() -> None:
    assert list_visible_targets(caller_of(residency=ONSITE), (LOCAL, HOSTED)) == (LOCAL,)
    assert list_visible_targets(caller_of(), (LOCAL, HOSTED)) == (LOCAL, HOSTED)


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        ("gpt-6", ["onsite/tiny", "cloud/big"]),
        ("claude-opus", ["cloud/big"]),
        ("claude-haiku-9", ["onsite/tiny"]),
        ("tiny", ["onsite/tiny"]),
    ],
)
def test_names_of_other_apis_models_stand_for_what_the_policy_says(asked: str, targets: list[str]) -> None:
    aliases = '[aliases]\n"gpt-6" = "auto"\n"claude-opus" = "cloud/big"\n"claude-*" = "tiny"\n'
    ranking = ranked(request_of(model=asked), policy=LOCAL_FIRST + aliases)
    assert order(ranking) == targets


def test_a_name_that_no_alias_has_is_refused_as_ever() -> None:
    assert isinstance(
        ranked(request_of(model="gpt-9"), policy=LOCAL_FIRST + '[aliases]\n"gpt-6" = "auto"\n').refusal, UnknownModel
    )
