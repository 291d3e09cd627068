"""The policy applied to one request: which route, which targets, in which order, and why. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from appliance.config import Match, Policy, RouteRule
from appliance.core import Attempt, Caller, Excluded, Profile, Request, Residency, Route, Snapshot, Target
from appliance.errors import (
    ApplianceError,
    ContextTooLong,
    Forbidden,
    ResidencyRefused,
    Unavailable,
    UnknownModel,
    Unsupported,
)
from appliance.pipeline.capacity import Prediction
from appliance.pipeline.residency import bound_of

AUTO: Final = "auto"

_MAX_NAMES: Final = 30


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of one target for this request."""

    prediction: Prediction
    prompt_tokens: int
    """By this target's own count, as far as it is known."""
    least_prompt_tokens: int
    """What the count is hardly ever below."""
    blocked_seconds: float | None = None
    """How long its breaker keeps it from being tried; None where it may be."""


@dataclass(frozen=True, slots=True)
class Ranking:
    route: Route
    refusal: ApplianceError | None
    """What to tell the caller where no attempt is left; None where there is one."""


_Kind = Literal["residency", "needs", "context", "blocked", "waiting", "late", "now"]


@dataclass(frozen=True, slots=True)
class _Judged:
    target: Target
    position: int
    """From 1, in the route's order of preference."""
    kind: _Kind
    reason: str


def rank(
    request: Request, profile: Profile, policy: Policy, snapshot: Snapshot, outlooks: Mapping[str, Outlook]
) -> Ranking:
    """`outlooks` has every target of `snapshot`. Raises UnknownModel, or Forbidden where the key may use no route.

    An empty set of attempts stays empty: `refusal` says why.
    """
    rule = route_of(request, profile, policy)
    bound, bound_reason = bound_of(
        request, route=rule.name, route_residency=rule.residency, default=policy.defaults.residency
    )
    pinned = pinned_targets(request.model, snapshot.targets)
    candidates = in_order(rule.targets, snapshot.targets) if pinned is None else pinned
    budget = rule.latency_budget_seconds or policy.defaults.latency_budget_seconds
    judged = [
        _judge(request, target, position, bound, bound_reason, outlooks[target.name], budget)
        for position, target in enumerate(candidates, 1)
    ]
    attempts, excluded = _arrange(judged, rule, profile, pinned=pinned is not None)
    route = Route(
        name=rule.name,
        policy_version=policy.version,
        residency=bound,
        residency_reason=bound_reason,
        attempts=attempts,
        excluded=excluded,
        latency_budget_seconds=budget,
        max_wait_seconds=rule.max_wait_seconds or policy.defaults.max_wait_seconds,
        total_seconds=rule.total_seconds or policy.defaults.total_seconds,
        max_attempts=rule.max_attempts or policy.defaults.max_attempts,
        pinned=pinned is not None,
    )
    return Ranking(route, None if attempts else _refusal(request, route, judged, outlooks))


def route_of(request: Request, profile: Profile, policy: Policy) -> RouteRule:
    """The first route that matches and that the key may use. Raises Forbidden where there is none."""
    allowed = request.caller.routes
    for rule in policy.routes:
        if (allowed is None or rule.name in allowed) and _matches(rule.match, request, profile):
            return rule
    raise Forbidden(
        f"key {request.caller.name!r} may use {', '.join(sorted(allowed or ())) or 'no route'}, "
        f"and none of them is for this request (task {profile.task})"
    )


def _matches(match: Match, request: Request, profile: Profile) -> bool:
    given = (
        (match.task, profile.task),
        (match.endpoint, request.endpoint),
        (match.format, profile.format),
        (match.key, request.caller.name),
        (match.tag, request.tag),
    )
    if any(values is not None and value not in values for values, value in given):
        return False
    ranges = (
        (match.complexity_at_least, match.complexity_below, profile.complexity),
        (match.prompt_tokens_at_least, match.prompt_tokens_below, profile.prompt_tokens),
    )
    return all((low is None or value >= low) and (high is None or value < high) for low, high, value in ranges)


def in_order(words: Iterable[str], targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets that a route's words name, in its order, each once."""
    found: dict[str, Target] = {}
    for word in words:
        for target in targets:
            if word in (target.name, target.location):
                found.setdefault(target.name, target)
    return tuple(found.values())


def pinned_targets(model: str, targets: Sequence[Target]) -> tuple[Target, ...] | None:
    """The targets a pinned model leaves, or None for `auto`. Raises UnknownModel with the names that exist."""
    if model in ("", AUTO):
        return None
    exact = tuple(target for target in targets if target.name == model)
    found = exact or tuple(target for target in targets if bare_name(target) == model)
    if not found:
        names = sorted({AUTO, *(target.name for target in targets), *map(bare_name, targets)})
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        there = ", ".join(names[:_MAX_NAMES]) + more
        raise UnknownModel(f"model {model[:100]!r} does not exist here; there are {there}", param="model")
    return found


def bare_name(target: Target) -> str:
    """The model's name without its place: `onsite/qwen3-4b` is `qwen3-4b`."""
    return target.name.partition("/")[2] or target.name


def visible_targets(caller: Caller, targets: Sequence[Target]) -> tuple[Target, ...]:
    """What `caller` could ever be answered by: a key bound to the site does not see hosted models."""
    return tuple(target for target in targets if caller.residency.allows(target))


def _judge(
    request: Request,
    target: Target,
    position: int,
    bound: Residency,
    bound_reason: str,
    outlook: Outlook,
    budget_seconds: float,
) -> _Judged:
    kind, reason = _verdict(request, target, bound, bound_reason, outlook, budget_seconds)
    return _Judged(target, position, kind, reason)


def _verdict(
    request: Request, target: Target, bound: Residency, bound_reason: str, outlook: Outlook, budget_seconds: float
) -> tuple[_Kind, str]:
    if not bound.allows(target):
        return "residency", f"outside the residency bound ({bound_reason})"
    missing = request.needs - target.abilities
    if missing:
        return "needs", f"cannot do {', '.join(sorted(missing))}"
    context = target.context_tokens
    if context is not None and outlook.least_prompt_tokens + 1 > context:
        return "context", f"the prompt has about {outlook.prompt_tokens} tokens, the context {context}"
    if outlook.blocked_seconds is not None:
        return "blocked", f"it kept failing; tried again in {outlook.blocked_seconds:.0f} s"
    prediction = outlook.prediction
    if not prediction.ready:
        return "waiting", prediction.reason
    if context is not None and outlook.prompt_tokens + 1 > context:
        return "late", f"the prompt may be too long (about {outlook.prompt_tokens} tokens, context {context})"
    if prediction.first_byte_seconds > budget_seconds:
        needs = f"would need {prediction.first_byte_seconds:.1f} s to the first token, budget {budget_seconds:.1f} s"
        return "late", needs
    return "now", ""


def _arrange(
    judged: Sequence[_Judged], rule: RouteRule, profile: Profile, *, pinned: bool
) -> tuple[tuple[Attempt, ...], tuple[Excluded, ...]]:
    """In the route's order: those who can begin in time, then those who cannot; engines that are not up only where
    nothing else is left, for a request can wait for them."""
    now = [one for one in judged if one.kind == "now"]
    late = [one for one in judged if one.kind == "late"]
    waiting = [one for one in judged if one.kind == "waiting"]
    usable = [*now, *late] or waiting
    attempts = tuple(Attempt(one.target, _reason(one, judged, rule, profile, pinned=pinned)) for one in usable)
    excluded = tuple(Excluded(one.target.name, one.reason) for one in judged if one not in usable)
    return attempts, excluded


def _reason(one: _Judged, judged: Sequence[_Judged], rule: RouteRule, profile: Profile, *, pinned: bool) -> str:
    if one.kind == "waiting":
        return f"waits for {one.target.name}: {one.reason}"
    if one.kind == "late":
        return f"{one.target.name} {one.reason}, and nothing better is left"
    passed_over = [
        other for other in judged if other.position < one.position and other.kind in ("late", "waiting", "blocked")
    ]
    if passed_over:
        first = passed_over[0]
        return f"overflow: {first.target.name} {first.reason}"
    if pinned:
        return "pinned by the request"
    least = rule.match.complexity_at_least
    if least is not None and one.position == 1:
        return f"complex: {profile.complexity:.2f} is at least {least:.2f} (route {rule.name})"
    return f"{_ordinal(one.position)} choice of route {rule.name}"


def _ordinal(position: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth")
    return words[position - 1] if position <= len(words) else f"{position}th"


def _refusal(
    request: Request, route: Route, judged: Sequence[_Judged], outlooks: Mapping[str, Outlook]
) -> ApplianceError:
    """The most helpful of the reasons: what passes by itself, then what the caller can change, then what nobody can."""
    by_kind: dict[str, list[_Judged]] = {}
    for one in judged:
        by_kind.setdefault(one.kind, []).append(one)
    bound = "" if "residency" not in by_kind else f" (targets outside {route.residency} are not allowed to answer it)"
    if blocked := by_kind.get("blocked"):
        soonest = min(outlooks[one.target.name].blocked_seconds or 0.0 for one in blocked)
        names = ", ".join(one.target.name for one in blocked)
        return Unavailable(
            f"every target left for this request keeps failing: {names}; try again in {soonest:.0f} s{bound}",
            retry_after_seconds=max(1.0, soonest),
        )
    if tight := by_kind.get("context"):
        widest = max(tight, key=lambda one: one.target.context_tokens or 0)
        tokens = outlooks[widest.target.name].prompt_tokens
        context = widest.target.context_tokens
        return ContextTooLong(
            f"the prompt has about {tokens} tokens and the largest context here is {context} tokens: shorten it{bound}",
            param="messages" if request.endpoint == "chat" else None,
        )
    if unable := by_kind.get("needs"):
        what = "; ".join(f"{one.target.name} {one.reason}" for one in unable[:5])
        return Unsupported(f"no target can do what this request asks for: {what}{bound}")
    if by_kind.get("residency"):
        asked = f"model {request.model!r} is" if route.pinned else "every target of its route is"
        return ResidencyRefused(
            f"{asked} outside this request's bound: {route.residency_reason}. "
            "Use an on-site model, or a key and header that allow it to leave"
        )
    return Unavailable(f"route {route.name!r} has no target on this node: start an engine or configure a provider")
