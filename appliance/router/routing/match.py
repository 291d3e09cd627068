"""Which route a request takes, and which targets a route's words name. Pure."""

from collections.abc import Collection, Iterable, Sequence

from appliance.config import Policy, RouteMatch, RouteRule
from appliance.core import Caller, Profile, Request, Target
from appliance.errors import BudgetExceeded, Forbidden

QUOTA_WINDOW_SECONDS = 3600.0
_FOR_ONE_TASK = frozenset({"classify", "decisions", "embeddings"})


def match_route(request: Request, profile: Profile, policy: Policy, over_quota: Collection[str] = ()) -> RouteRule:
    """The first route that matches, that the key may use, and that has quota left.

    Raises Forbidden where there is none or the route does not allow the request's risk class, and BudgetExceeded where
    its quota is used up and it is not to be passed over.
    """
    allowed = request.caller.routes
    for rule in policy.routes:
        if (allowed is not None and rule.name not in allowed) or not matches(rule.match, request, profile):
            continue
        if rule.name in over_quota:
            if rule.beyond_quota == "next":
                continue
            raise BudgetExceeded(
                f"route {rule.name!r} takes at most {rule.quota:.0%} of all requests, and has taken them for this hour",
                retry_after_seconds=60.0,
            )
        if rule.allowed_risk is not None and profile.risk not in rule.allowed_risk:
            raise Forbidden(
                f"this request is of risk class {profile.risk!r}, and route {rule.name!r} is for "
                f"{', '.join(rule.allowed_risk)} alone: add a route for it to the policy"
            )
        return rule
    raise Forbidden(
        f"key {request.caller.name!r} may use {', '.join(sorted(allowed or ())) or 'no route'}, "
        f"and none of them is for this request (task {profile.task})"
    )


def matches(match: RouteMatch, request: Request, profile: Profile) -> bool:
    """Whether every field of `match` that is given holds."""
    values: dict[str, str | None] = {
        "task": profile.task,
        "endpoint": request.endpoint,
        "format": profile.format,
        "latency_class": profile.latency_class,
        "language": profile.language,
        "risk": profile.risk,
        "key": request.caller.name,
        "tier": request.caller.tier,
        "tag": request.tag,
    }
    for name, accepted in match.lists():
        if accepted is not None and values[name] not in accepted:
            return False
    figures: dict[str, float] = {
        "complexity": profile.complexity,
        "prompt_tokens": profile.prompt_tokens,
        "output_tokens": profile.output_tokens,
    }
    for name, low, high in match.ranges():
        figure = figures[name]
        if (low is not None and figure < low) or (high is not None and figure >= high):
            return False
    return match.header is None or all(request.headers.get(name) == text for name, text in match.header.items())


def list_fallback_chain(rule: RouteRule, policy: Policy) -> tuple[RouteRule, ...]:
    """The route and the ones whose targets follow after its own; the policy was checked to have no circle."""
    chain = [rule]
    while chain[-1].fallback is not None:
        following = policy.route(chain[-1].fallback)
        if following is None or following in chain:
            break
        chain.append(following)
    return tuple(chain)


def order_targets(words: Iterable[str], targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets that a route's words name, in its order, each once.

    A place names models that are for anybody's questions; what was made for one task is named by itself alone.
    """
    found: dict[str, Target] = {}
    for word in words:
        for target in targets:
            if word == target.name or (word == target.location and not is_made_for_one_task(target)):
                found.setdefault(target.name, target)
    return tuple(found.values())


def is_made_for_one_task(target: Target) -> bool:
    """A classifier or an embedding model of this node: it answers what it was made for, and nothing else."""
    return target.provider is None and bool(target.abilities) and target.abilities <= _FOR_ONE_TASK


def bare_name(target: Target) -> str:
    """The model's name without its place: `onsite/qwen3-4b` is `qwen3-4b`."""
    return target.name.partition("/")[2] or target.name


def list_visible_targets(caller: Caller, targets: Sequence[Target]) -> tuple[Target, ...]:
    """What `caller` could ever be answered by: a key bound to the site does not see hosted models."""
    return tuple(target for target in targets if caller.residency.allows(target))
