"""Where a request may be answered, and the only maker of permits to send it off the site. Pure but for its key."""

import secrets
from collections.abc import Mapping
from typing import Final

from appliance.config import Policy, RouteRule
from appliance.core import (
    ANYWHERE,
    EgressPermit,
    PersonalKind,
    PiiScanResult,
    Request,
    Residency,
    Target,
    strictest,
)
from appliance.errors import ResidencyRefused
from appliance.upstream.permit_signature import batch_id, sign_permit

KIND_NAMES: Final[Mapping[PersonalKind, str]] = {
    "email": "e-mail address",
    "phone": "telephone number",
    "payment_card": "card number",
    "iban": "IBAN",
    "bic": "BIC",
    "national_id": "national id",
    "passport": "passport number",
    "driver_license": "driving licence",
    "medical_record": "medical record number",
    "date_of_birth": "date of birth",
    "ip_address": "IP address",
    "mac_address": "MAC address",
    "crypto_wallet": "crypto wallet",
    "credentials": "credentials",
    "postal_address": "postal address",
    "person_name": "person's name",
}


def resolve_residency(
    request: Request, *, route: str, route_residency: str | None, default: str, content: Residency | None = None
) -> tuple[Residency, str]:
    """The strictest of what key, header, route, policy and the request's content say, and why.

    `route_residency` is what the route itself says, None when it leaves that to the policy's default. `content` is what
    personal data binds this route's requests to, None where it does not count. The reason names kinds, never the data.
    """
    said = [
        (f"key {request.caller.name!r}", request.caller.residency),
        ("the request's header", request.residency or ANYWHERE),
        (f"route {route!r}", Residency.parse(route_residency) if route_residency else ANYWHERE),
    ]
    if route_residency is None:
        said.append(("the policy's defaults", Residency.parse(default)))
    if content is not None and (found := _of_content(request.content)):
        said.append((found, content))
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


def resolve_route_residency(request: Request, rule: RouteRule, policy: Policy) -> tuple[Residency, str]:
    """As bound_of, for a request that takes the route `rule`."""
    return resolve_residency(
        request,
        route=rule.name,
        route_residency=rule.residency,
        default=policy.defaults.residency,
        content=policy.content_bound(rule),
    )


def _of_content(content: PiiScanResult | None) -> str:
    """What about the content binds; empty where nothing does. Not to have been searched binds too."""
    if content is None:
        return "its content (not searched)"
    what = [KIND_NAMES[kind] for kind in content.kinds]
    if content.not_searched:
        what.append(f"not searched: {content.not_searched}")
    return f"its content ({', '.join(what)})" if what else ""


class EgressPermitIssuer:
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
        return EgressPermit(request.id, target.name, sign_permit(self.key, request.id, target))

    def batch_permit(self, name: str, target: Target) -> EgressPermit:
        """Leave to speak to `target` of the batch `name`, whose lines each had a permit. With it no request can be
        sent; what comes back is the answers to what was sent before."""
        said = batch_id(name)
        return EgressPermit(said, target.name, sign_permit(self.key, said, target))


def _in_region(target: Target) -> str:
    return f" in {target.region}" if target.region else " (no region declared)"
