"""Where a request may be answered, and the only maker of permits to send it off the site. Pure but for its key."""

import secrets

from appliance.backends.seal import seal
from appliance.core import ANYWHERE, EgressPermit, Request, Residency, Target, strictest
from appliance.errors import ResidencyRefused


def bound_of(request: Request, *, route: str, route_residency: str | None, default: str) -> tuple[Residency, str]:
    """The strictest of what key, header, route and policy say, and why.

    `route_residency` is what the route itself says, None when it leaves that to the policy's default.
    """
    said = [
        (f"key {request.caller.name!r}", request.caller.residency),
        ("the request's header", request.residency or ANYWHERE),
        (f"route {route!r}", Residency.parse(route_residency) if route_residency else ANYWHERE),
    ]
    if route_residency is None:
        said.append(("the policy's defaults", Residency.parse(default)))
    limits = [(who, bound) for who, bound in said if bound.kind != "any"]
    if not limits:
        return ANYWHERE, "nothing binds it"
    bound = strictest(*(one for _, one in limits))
    deciding = [who for who, one in limits if one == bound]
    others = [f"{who} says {one}" for who, one in limits if one != bound]
    if request.residency == ANYWHERE:
        others.append("the request's header says any")
    reason = f"{bound} by {' and '.join(deciding)}" if deciding else f"{bound}, the only place inside every bound"
    return bound, f"{reason}; the stricter wins over: {', '.join(others)}" if others else reason


class PermitOffice:
    """Makes permits. Its key is this process's own and is shared with the egress door alone."""

    def __init__(self, key: bytes | None = None) -> None:
        self.key = key or secrets.token_bytes(32)

    def __repr__(self) -> str:
        return "PermitOffice()"

    def permit(self, request: Request, target: Target, bound: Residency) -> EgressPermit:
        """Leave to send `request` to `target`. Raises ResidencyRefused where `bound` does not allow that.

        Key and header are looked at once more: a decision that forgot them must not get a permit either.
        """
        for limit in (bound, request.caller.residency, request.residency or ANYWHERE):
            if not limit.allows(target):
                raise ResidencyRefused(
                    f"{target.name} is hosted{_in_region(target)}, and this request is bound to {limit}"
                )
        return EgressPermit(request.id, target.name, seal(self.key, request.id, target))


def _in_region(target: Target) -> str:
    return f" in {target.region}" if target.region else " (no region declared)"
