"""What to tell a caller whose request no target can take: the most helpful of the reasons. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from appliance.core import Request, Route, Target
from appliance.errors import (
    ApplianceError,
    BudgetExceeded,
    ContextTooLong,
    ResidencyRefused,
    Unavailable,
    UnknownModel,
    Unsupported,
)
from appliance.router.routing.match import bare_name, list_visible_targets

Kind = Literal["residency", "needs", "quality", "context", "cost", "blocked", "waiting", "late", "now"]

_MAX_NAMES: Final = 30

_PROMPT_FIELDS: Final[Mapping[str, str]] = {
    "chat": "messages",
    "messages": "messages",
    "responses": "input",
    "generate_content": "contents",
}


@dataclass(frozen=True, slots=True)
class RejectedCandidate:
    """One candidate, and what keeps it from answering, if anything does."""

    target: Target
    position: int
    """From 1, in the route's order of preference."""
    kind: Kind
    reason: str
    prompt_tokens: int = 0
    blocked_seconds: float = 0.0
    via: str | None = None
    """The route that it is a target of, where that is a fallback."""
    merit: str = ""
    """Its score in words, where the route chooses by scores."""


def explain_no_target(request: Request, route: Route, judged: Sequence[RejectedCandidate]) -> ApplianceError:
    """What passes by itself first, then what the caller can change, then what nobody can."""
    by_kind: dict[str, list[RejectedCandidate]] = {}
    for one in judged:
        by_kind.setdefault(one.kind, []).append(one)
    bound = "" if "residency" not in by_kind else f" (targets outside {route.residency} are not allowed to answer it)"
    if blocked := by_kind.get("blocked"):
        soonest = min(one.blocked_seconds for one in blocked)
        names = ", ".join(one.target.name for one in blocked)
        return Unavailable(
            f"every target left for this request keeps failing: {names}; try again in {soonest:.0f} s{bound}",
            retry_after_seconds=max(1.0, soonest),
        )
    if dear := by_kind.get("cost"):
        return BudgetExceeded(f"no target is cheap enough: {_each(dear)}{bound}; shorten the prompt or the answer")
    if tight := by_kind.get("context"):
        widest = max(tight, key=lambda one: one.target.context_tokens or 0)
        return ContextTooLong(
            f"the prompt has about {widest.prompt_tokens} tokens and the largest context here is "
            f"{widest.target.context_tokens} tokens: shorten it{bound}",
            param=_PROMPT_FIELDS.get(request.endpoint),
        )
    if unable := by_kind.get("needs"):
        return Unsupported(f"no target can do what this request asks for: {_each(unable)}{bound}")
    return _nowhere(request, route, by_kind)


def _nowhere(request: Request, route: Route, by_kind: Mapping[str, Sequence[RejectedCandidate]]) -> ApplianceError:
    if poor := by_kind.get("quality"):
        return Unavailable(f"no target reaches the quality floor of route {route.name!r}: {_each(poor)}")
    if by_kind.get("residency"):
        asked = f"model {request.model!r} is" if route.pinned else "every target of its route is"
        return ResidencyRefused(
            f"{asked} outside this request's bound: {route.residency_reason}. "
            "Use an on-site model, or a key and header that allow it to leave"
        )
    return Unavailable(f"route {route.name!r} has no target on this node: start an engine or configure a provider")


def _each(judged: Sequence[RejectedCandidate]) -> str:
    return "; ".join(f"{one.target.name} {one.reason}" for one in judged[:5])


def make_unknown_model_error(request: Request, auto: str, targets: Sequence[Target]) -> UnknownModel:
    """Names what exists for this caller; a key bound to the site is not told of hosted models."""
    seen = list_visible_targets(request.caller, targets)
    names = sorted({auto, *(target.name for target in seen), *map(bare_name, seen)})
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    there = ", ".join(names[:_MAX_NAMES]) + more
    return UnknownModel(f"model {request.model[:100]!r} does not exist here; there are {there}", param="model")
