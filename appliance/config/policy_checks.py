"""What is wrong with a policy whose every field is right: routes that contradict each other or the targets."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from appliance.config.policy import Policy, RouteRule
from appliance.config.route_match import RouteMatch
from appliance.core import Residency, Target

LOCATIONS: Final = ("onsite", "hosted")
CLASSIFIER: Final = "classifier/"
"""What names of trained classifiers begin with."""


class PolicyMistake(NamedTuple):
    location: tuple[int | str, ...]
    """Of the setting that is to be changed."""
    message: str


def find_first_mistake(policy: Policy, targets: Sequence[Target | str] | None) -> PolicyMistake | None:
    """The first contradiction, or None. `targets`: all there are, a plain name for an engine of this node; None where
    they are not known, and then only the policy itself is looked at."""
    return next(_mistakes(policy, targets), None)


def _mistakes(policy: Policy, targets: Sequence[Target | str] | None) -> Iterator[PolicyMistake]:
    yield from _order(policy)
    for index, route in enumerate(policy.routes):
        yield from _fallback(policy, index, route)
        yield from _times(policy, index, route)
        yield from _steps(index, route)
        yield from _bound_to_nothing(index, route)
        yield from _cascades(index, route)
        if targets is not None:
            yield from _targets(policy, index, route, targets)


def _order(policy: Policy) -> Iterator[PolicyMistake]:
    names: set[str] = set()
    for index, route in enumerate(policy.routes):
        if route.name in names:
            yield PolicyMistake(("routes", index, "name"), f"route {route.name!r} is defined twice")
        names.add(route.name)
        for earlier in policy.routes[:index]:
            if _lets_through(earlier) or not covers(earlier.match, route.match):
                continue
            what = "everything" if earlier.match == RouteMatch() else f"all that route {route.name!r} matches"
            message = f"route {earlier.name!r} matches {what}, so route {route.name!r} can never be used"
            yield PolicyMistake(("routes", index, "match"), message)
    last = len(policy.routes) - 1
    route = policy.routes[last]
    if route.match != RouteMatch():
        message = f"the last route, {route.name!r}, has a match: end with a route for everything else"
        yield PolicyMistake(("routes", last, "match"), message)
    if _lets_through(route):
        message = f"beyond its quota the last route, {route.name!r}, has no next one: set beyond_quota to refuse"
        yield PolicyMistake(("routes", last, "quota"), message)


def _lets_through(route: RouteRule) -> bool:
    return route.quota is not None and route.beyond_quota == "next"


def covers(wide: RouteMatch, narrow: RouteMatch) -> bool:
    """Whether every request that `narrow` matches is matched by `wide` too."""
    for (_, accepted), (_, given) in zip(wide.lists(), narrow.lists(), strict=True):
        if accepted is not None and (given is None or not set(given) <= set(accepted)):
            return False
    for (_, low, high), (_, least, most) in zip(wide.ranges(), narrow.ranges(), strict=True):
        if low is not None and (least is None or least < low):
            return False
        if high is not None and (most is None or most > high):
            return False
    return (wide.header or {}).items() <= (narrow.header or {}).items()


def _fallback(policy: Policy, index: int, route: RouteRule) -> Iterator[PolicyMistake]:
    if route.fallback is None:
        return
    place = ("routes", index, "fallback")
    chain = [route.name]
    here: RouteRule | None = route
    while here is not None and here.fallback is not None:
        following = policy.route(here.fallback)
        if following is None:
            names = ", ".join(one.name for one in policy.routes)
            yield PolicyMistake(place, f"route {here.fallback!r} does not exist; there are {names}")
            return
        chain.append(following.name)
        if following.name in chain[:-1]:
            yield PolicyMistake(place, f"the fallbacks go round in a circle: {' -> '.join(chain)}")
            return
        here = following


def _times(policy: Policy, index: int, route: RouteRule) -> Iterator[PolicyMistake]:
    total = route.total_seconds or policy.defaults.total_seconds
    budget = route.latency_budget_seconds or policy.defaults.latency_budget_seconds
    answer = route.answer_budget_seconds
    name = "latency_budget_seconds" if route.latency_budget_seconds else "total_seconds"
    if budget > total:
        message = f"the first token may take {budget:g} s, and all attempts together only {total:g} s"
        yield PolicyMistake(("routes", index, name) if _is_set(route, name) else ("defaults", name), message)
    if answer is not None and answer > total:
        message = f"the answer may take {answer:g} s, and all attempts together only {total:g} s"
        yield PolicyMistake(("routes", index, "answer_budget_seconds"), message)


def _is_set(route: RouteRule, name: str) -> bool:
    return getattr(route, name) is not None


def _steps(index: int, route: RouteRule) -> Iterator[PolicyMistake]:
    for number, step in enumerate(route.degrade[:-1]):
        if step.step == "static":
            message = "a static step always answers, so the steps after it can never be taken"
            yield PolicyMistake(("routes", index, "degrade", number + 1), message)


def _bound_to_nothing(index: int, route: RouteRule) -> Iterator[PolicyMistake]:
    if route.residency == "onsite" and set(route.targets) == {"hosted"}:
        message = f"route {route.name!r} is bound to the site, and its targets are all hosted"
        yield PolicyMistake(("routes", index, "residency"), message)


def _cascades(index: int, route: RouteRule) -> Iterator[PolicyMistake]:
    cascade = route.cascade
    if cascade is None:
        if route.keep_texts:
            message = "texts are kept for a cascade to learn from: give the route one"
            yield PolicyMistake(("routes", index, "keep_texts"), message)
        return
    first, *later = route.targets
    if not first.startswith(CLASSIFIER) or not later or any(word.startswith(CLASSIFIER) for word in later):
        example = f'targets = ["{CLASSIFIER}NAME", "onsite"]'
        message = f"a cascade begins with one classifier and goes on to models, as in {example}"
        yield PolicyMistake(("routes", index, "targets"), message)
    if route.escalation is not None:
        yield PolicyMistake(("routes", index, "escalation"), "a cascade escalates by itself: keep one of the two")
    if route.score is not None:
        yield PolicyMistake(("routes", index, "score"), "a cascade's targets are its steps in order: leave score out")
    if cascade.learn_after is not None and not route.keep_texts:
        yield PolicyMistake(
            ("routes", index, "cascade"), "learn_after needs texts to learn from: set keep_texts = true"
        )


def _targets(policy: Policy, index: int, route: RouteRule, targets: Sequence[Target | str]) -> Iterator[PolicyMistake]:
    words = [("targets", word) for word in route.targets]
    words += [("escalation", word) for word in (route.escalation.to if route.escalation else ())]
    names = {_name(target) for target in targets}
    for field, word in words:
        # Classifiers come and go while a node runs: a route names one before it was trained.
        if word not in names and word not in LOCATIONS and not word.startswith(CLASSIFIER):
            known = ", ".join([*LOCATIONS, *sorted(names)])
            message = f"target {word!r} of route {route.name!r} does not exist; there are {known}"
            yield PolicyMistake(("routes", index, field), message)
    reached = [target for target in targets if {_name(target), _location(target)} & set(route.targets)]
    yield from _unreachable(policy, index, route, reached)
    if targets:
        yield from _qualities(index, route, [target for target in reached if isinstance(target, Target)])


def _unreachable(
    policy: Policy, index: int, route: RouteRule, reached: Sequence[Target | str]
) -> Iterator[PolicyMistake]:
    bound = Residency.parse(route.residency or policy.defaults.residency)
    if bound.kind == "any" or any(isinstance(one, str) or bound.allows(one) for one in reached):
        return
    where = ", ".join(f"{_name(one)} ({_region(one)})" for one in reached) or "none that is configured"
    place = ("routes", index, "residency") if route.residency else ("defaults", "residency")
    yield PolicyMistake(place, f"route {route.name!r} is bound to {bound}, and nobody serves it there: {where}")


def _qualities(index: int, route: RouteRule, reached: Sequence[Target]) -> Iterator[PolicyMistake]:
    """Of configured targets: what the engines of this node declare is known once they are chosen."""
    if route.score is not None and route.score.quality > 0:
        for target in reached:
            if target.quality is None:
                message = f"quality has a weight, and {target.name} declares none: set quality on its model"
                yield PolicyMistake(("routes", index, "score"), message)
    floor = route.min_quality
    hosted_only = "onsite" not in route.targets and not any(word.startswith("onsite/") for word in route.targets)
    if floor is not None and reached and hosted_only and all((one.quality or 0.0) < floor for one in reached):
        declared = ", ".join(f"{one.name} {one.quality}" for one in reached)
        message = f"no target of route {route.name!r} reaches {floor}: {declared}"
        yield PolicyMistake(("routes", index, "min_quality"), message)


def _name(target: Target | str) -> str:
    return target if isinstance(target, str) else target.name


def _location(target: Target | str) -> str:
    return "onsite" if isinstance(target, str) else target.location


def _region(target: Target | str) -> str:
    return "on-site" if isinstance(target, str) else target.region or "no region declared"
