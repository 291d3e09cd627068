"""The policy applied to one request: which route, which targets, in which order, and why. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from appliance.config import Policy, RouteRule
from appliance.core import Attempt, ExcludedTarget, Profile, Request, Residency, Route, Snapshot, Target
from appliance.errors import ApplianceError
from appliance.router.capacity.predictor import Prediction
from appliance.router.residency import resolve_residency, resolve_route_residency
from appliance.router.routing.match import bare_name, list_fallback_chain, match_route, order_targets
from appliance.router.routing.no_target import Kind, RejectedCandidate, explain_no_target, make_unknown_model_error
from appliance.router.routing.score import TargetFigures, rank_by_score

AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class TargetEstimate:
    """What is to be expected of one target for this request."""

    prediction: Prediction
    prompt_tokens: int
    """By this target's own count, as far as it is known."""
    least_prompt_tokens: int
    """What the count is hardly ever below."""
    blocked_seconds: float | None = None
    """How long its breaker keeps it from being tried; None where it may be."""
    usd: float = 0.0
    """The most that one attempt is going to cost, as far as it is known."""
    usd_per_success: float | None = None
    """What an answer has cost of late on this route; None where too few have been seen."""


@dataclass(frozen=True, slots=True)
class RankedTargets:
    route: Route
    refusal: ApplianceError | None
    """What to tell the caller where no attempt is left; None where there is one."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What every candidate is judged by."""

    request: Request
    rule: RouteRule
    route: Route
    """Without its attempts."""
    outlooks: Mapping[str, TargetEstimate]


def rank_targets(
    request: Request,
    profile: Profile,
    policy: Policy,
    snapshot: Snapshot,
    outlooks: Mapping[str, TargetEstimate],
    rule: RouteRule | None = None,
) -> RankedTargets:
    """`outlooks` has every target of `snapshot`; `rule` is the route that was chosen, else it is chosen here.

    An empty set of attempts stays empty: `refusal` says why. Raises Forbidden or BudgetExceeded as `match_route` does.
    """
    rule = rule or match_route(request, profile, policy)
    pinned = find_pinned_targets(policy.resolve_alias(request.model), snapshot.targets)
    route = _bare_route(request, rule, policy, pinned=pinned is not None)
    if pinned == ():
        return RankedTargets(route, make_unknown_model_error(request, AUTO, snapshot.targets))
    case = _Case(request, rule, route, outlooks)
    judged = _judge_all(case, policy, snapshot.targets) if pinned is None else _judge_in_order(case, pinned)
    attempts, cold_targets, excluded = _arrange(judged, case, profile)
    escalations = () if pinned is not None or rule.escalation is None else _escalations(case, snapshot.targets)
    route = replace(route, attempts=attempts, cold_targets=cold_targets, excluded=excluded, escalations=escalations)
    return RankedTargets(route, None if attempts else explain_no_target(request, route, judged))


def _bare_route(request: Request, rule: RouteRule, policy: Policy, *, pinned: bool) -> Route:
    defaults = policy.defaults
    bound, bound_reason = resolve_route_residency(request, rule, policy)
    route = Route(
        name=rule.name,
        policy_version=policy.version,
        residency=bound,
        residency_reason=bound_reason,
        attempts=(),
        excluded=(),
        latency_budget_seconds=rule.latency_budget_seconds or defaults.latency_budget_seconds,
        max_wait_seconds=rule.max_wait_seconds or defaults.max_wait_seconds,
        total_seconds=rule.total_seconds or defaults.total_seconds,
        max_attempts=rule.max_attempts or defaults.max_attempts,
        pinned=pinned,
        stage=rule.stage,
        answer_budget_seconds=rule.answer_budget_seconds,
        max_cost_usd=rule.max_cost_usd,
        retry_billed=rule.retry_billed,
        verify=rule.verify,
    )
    return route if request.patience_seconds is None else _patient(route, request.patience_seconds)


def _patient(route: Route, seconds: float) -> Route:
    """For work that can wait: its own patience stands in for what the route allows somebody who is waiting."""
    return replace(
        route,
        latency_budget_seconds=seconds,
        max_wait_seconds=max(route.max_wait_seconds, seconds),
        total_seconds=route.total_seconds + seconds,
        answer_budget_seconds=None,
    )


def make_empty_route(request: Request, policy: Policy) -> Route:
    """For a request that may use none: refused, and written down all the same."""
    bound, reason = resolve_residency(request, route="none", route_residency=None, default=policy.defaults.residency)
    defaults = policy.defaults
    return Route(
        name="none",
        policy_version=policy.version,
        residency=bound,
        residency_reason=reason,
        attempts=(),
        excluded=(),
        latency_budget_seconds=defaults.latency_budget_seconds,
        max_wait_seconds=defaults.max_wait_seconds,
        total_seconds=defaults.total_seconds,
        max_attempts=defaults.max_attempts,
    )


def find_pinned_targets(model: str, targets: Sequence[Target]) -> tuple[Target, ...] | None:
    """The targets a pinned model leaves (none where nobody has it), or None for `auto`."""
    if model in ("", AUTO):
        return None
    exact = tuple(target for target in targets if target.name == model)
    return exact or tuple(target for target in targets if bare_name(target) == model)


def _judge_all(case: _Case, policy: Policy, targets: Sequence[Target]) -> list[RejectedCandidate]:
    """The route's own targets, then those of the routes it falls back on, each once."""
    judged: list[RejectedCandidate] = []
    for rule in list_fallback_chain(case.rule, policy):
        known = {one.target.name for one in judged}
        fresh = tuple(target for target in order_targets(rule.targets, targets) if target.name not in known)
        if rule is case.rule:
            judged += _judge_in_order(case, fresh)
            continue
        own, _ = resolve_route_residency(case.request, rule, policy)
        found = _judge_in_order(replace(case, rule=rule), fresh, first=len(judged) + 1)
        judged += [replace(_inside(one, own, rule.name), via=rule.name) for one in found]
    return judged


def _inside(one: RejectedCandidate, bound: Residency, route: str) -> RejectedCandidate:
    """A fallback route's own bound holds for its targets too."""
    if one.kind == "residency" or bound.allows(one.target):
        return one
    return replace(one, kind="residency", reason=f"outside the residency bound ({bound} by route {route!r})")


def _judge_in_order(case: _Case, targets: Sequence[Target], first: int = 1) -> list[RejectedCandidate]:
    merits: Sequence[tuple[Target, str]] = [(target, "") for target in targets]
    if case.rule.score is not None and len(targets) > 1:
        figures = {target.name: _figures(target, case.outlooks[target.name]) for target in targets}
        merits = rank_by_score(targets, figures, case.rule.score, case.route.latency_budget_seconds)
    return [_judge(case, target, position, merit) for position, (target, merit) in enumerate(merits, first)]


def _figures(target: Target, outlook: TargetEstimate) -> TargetFigures:
    return TargetFigures(outlook.prediction.first_byte_seconds, outlook.usd, target.quality)


def _judge(case: _Case, target: Target, position: int, merit: str) -> RejectedCandidate:
    outlook = case.outlooks[target.name]
    kind, reason = _never(case, target, outlook) or _not_now(case, target, outlook)
    return RejectedCandidate(
        target, position, kind, reason, outlook.prompt_tokens, outlook.blocked_seconds or 0.0, None, merit
    )


def _never(case: _Case, target: Target, outlook: TargetEstimate) -> tuple[Kind, str] | None:
    """What no waiting mends."""
    request, rule, route = case.request, case.rule, case.route
    if not route.residency.allows(target):
        return "residency", f"outside the residency bound ({route.residency_reason})"
    missing = request.needs - target.abilities
    if missing:
        return "needs", f"cannot do {', '.join(sorted(missing))}"
    if rule.min_quality is not None and (target.quality is None or target.quality < rule.min_quality):
        declared = "declares no quality" if target.quality is None else f"declares quality {target.quality:g}"
        return "quality", f"{declared}, the floor is {rule.min_quality:g}"
    context = target.context_tokens
    if context is not None and outlook.least_prompt_tokens + 1 > context:
        return "context", f"the prompt has about {outlook.prompt_tokens} tokens, the context {context}"
    if rule.max_cost_usd is not None and outlook.usd > rule.max_cost_usd:
        return "cost", f"would cost up to {outlook.usd:.6f} USD, the ceiling is {rule.max_cost_usd:.6f} USD"
    ceiling = rule.max_cost_per_success_usd
    if ceiling is not None and outlook.usd_per_success is not None and outlook.usd_per_success > ceiling:
        return "cost", f"has cost {outlook.usd_per_success:.6f} USD an answer of late, the ceiling is {ceiling:.6f} USD"
    return None


def _not_now(case: _Case, target: Target, outlook: TargetEstimate) -> tuple[Kind, str]:
    """What may be better in a while."""
    prediction, route, context = outlook.prediction, case.route, target.context_tokens
    if outlook.blocked_seconds is not None:
        return "blocked", f"it kept failing; tried again in {outlook.blocked_seconds:.0f} s"
    if not prediction.ready:
        return "waiting", prediction.reason
    if context is not None and outlook.prompt_tokens + 1 > context:
        return "late", f"the prompt may be too long (about {outlook.prompt_tokens} tokens, context {context})"
    first, finish = prediction.first_byte_seconds, prediction.finish_seconds
    if first > route.latency_budget_seconds:
        return "late", f"would need {first:.1f} s to the first token, budget {route.latency_budget_seconds:.1f} s"
    if route.answer_budget_seconds is not None and finish > route.answer_budget_seconds:
        return "late", f"would need {finish:.1f} s for the whole answer, budget {route.answer_budget_seconds:.1f} s"
    if finish > route.total_seconds:
        return "late", f"would need {finish:.1f} s for the whole answer, which may take {route.total_seconds:.1f} s"
    return "now", ""


def _arrange(
    judged: Sequence[RejectedCandidate], case: _Case, profile: Profile
) -> tuple[tuple[Attempt, ...], tuple[Attempt, ...], tuple[ExcludedTarget, ...]]:
    """In the route's order: those who can begin in time, then those who cannot; engines that are not up only where
    nothing else is left, for a request can wait for them. Where something is, they stand by."""
    now = [one for one in judged if one.kind == "now"]
    late = [one for one in judged if one.kind == "late"]
    waiting = [one for one in judged if one.kind == "waiting"]
    usable = [*now, *late] or waiting
    attempts = tuple(_attempt(one, judged, case, profile) for one in usable)
    cold_targets = tuple(_attempt(one, judged, case, profile) for one in waiting if one not in usable)
    excluded = tuple(ExcludedTarget(one.target.name, one.reason) for one in judged if one not in usable)
    return attempts, cold_targets, excluded


def _attempt(one: RejectedCandidate, judged: Sequence[RejectedCandidate], case: _Case, profile: Profile) -> Attempt:
    if one.kind == "waiting":
        return Attempt(one.target, f"waits for {one.target.name}: {one.reason}")
    if one.kind == "late":
        return Attempt(one.target, f"{one.target.name} {one.reason}, and nothing better is left")
    passed_over = [
        other for other in judged if other.position < one.position and other.kind in ("late", "waiting", "blocked")
    ]
    if passed_over:
        first = passed_over[0]
        return Attempt(one.target, f"overflow: {first.target.name} {first.reason}", "overflow")
    if case.route.pinned:
        return Attempt(one.target, "pinned by the request")
    if one.via is not None:
        return Attempt(one.target, f"fallback route {one.via} of route {case.rule.name}", "fallback")
    return Attempt(one.target, _own_reason(one, case, profile))


def _own_reason(one: RejectedCandidate, case: _Case, profile: Profile) -> str:
    """Why the route itself puts a candidate where it stands."""
    if one.merit:
        return f"{_ordinal(one.position)} of route {case.rule.name} by {one.merit}"
    least = case.rule.match.complexity_at_least
    if least is not None and one.position == 1:
        return f"complex: {profile.complexity:.2f} is at least {least:.2f} (route {case.rule.name})"
    return f"{_ordinal(one.position)} choice of route {case.rule.name}"


def _ordinal(position: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth")
    return words[position - 1] if position <= len(words) else f"{position}th"


def _escalations(case: _Case, targets: Sequence[Target]) -> tuple[Attempt, ...]:
    """Who may be asked instead of an unsure answer; the quality floor and every bound hold for them too."""
    assert case.rule.escalation is not None
    candidates = order_targets(case.rule.escalation.to, targets)
    judged = [_judge(case, target, position, "") for position, target in enumerate(candidates, 1)]
    reason = f"escalation: an answer below {case.rule.escalation.below_confidence:g} (route {case.rule.name})"
    return tuple(Attempt(one.target, reason, "escalation") for one in judged if one.kind in ("now", "late"))
