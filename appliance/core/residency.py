"""Where a request may be answered."""

import re
from dataclasses import dataclass
from typing import Literal

from appliance.core.targets import Target

_REGION = re.compile(r"[A-Z]{2}(-[A-Z0-9]{1,8})?")


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a request may be answered: on this site, in one region (the site included), or anywhere allowed."""

    kind: Literal["onsite", "region", "any"]
    region: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Residency":
        """Read `onsite`, `any` or `region:XX`. Raises ValueError on anything else; nothing is read as "any"."""
        word = text.strip()
        if word == "onsite":
            return ONSITE
        if word == "any":
            return ANYWHERE
        prefix, _, region = word.partition(":")
        if prefix == "region" and _REGION.fullmatch(region.upper()):
            return cls("region", region.upper())
        raise ValueError(f"residency {text!r} is not known: use onsite, any, or region:XX (for example region:EU)")

    def allows(self, target: "Target") -> bool:
        """Whether `target` lies inside the bound. A hosted target without a region is outside every region."""
        if target.location == "onsite" or self.kind == "any":
            return True
        return self.kind == "region" and target.region is not None and target.region == self.region

    def __str__(self) -> str:
        return f"region:{self.region}" if self.kind == "region" else self.kind


ONSITE = Residency("onsite")
ANYWHERE = Residency("any")


def strictest(*bounds: Residency) -> Residency:
    """The bound that satisfies all of `bounds`; two different regions leave only the site itself."""
    regions = {bound.region for bound in bounds if bound.kind == "region"}
    if any(bound.kind == "onsite" for bound in bounds) or len(regions) > 1:
        return ONSITE
    return Residency("region", regions.pop()) if regions else ANYWHERE
