"""What a route does besides choosing: escalate, cascade, prune, degrade, and search for personal data."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from appliance.config.strict import Name, PositiveSeconds, StrictModel, check_residency
from appliance.core import PersonalKind, Residency

Share = Annotated[float, Field(gt=0, le=1)]
PositiveUsd = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1)]


class EscalationRule(StrictModel):
    """Ask a better target when the answer is unsure. Decisions, extractions, and chats that ask for logprobs."""

    below_confidence: Share
    """An answer is unsure when the least confidence of its parts is below this."""
    below_label_mass: Share | None = None
    """A decision is unsure too when less probability than this fell on its options."""
    max_rate: Share
    """Most escalations as a share of the answers judged in the window; beyond it unsure answers stand."""
    window_seconds: PositiveSeconds = 3600.0
    """Window over which that share is taken."""
    to: tuple[str, ...] = Field(min_length=1)
    """Targets to escalate to, in order of preference, as a route's targets."""


class CascadeRule(StrictModel):
    """The route's targets as steps for decisions: a classifier first, and each next word of `targets` is asked only
    about the texts that the one before was unsure of. Other requests find the same targets, in order of preference."""

    bound: Annotated[float, Field(gt=0, lt=1)]
    """Largest share of all texts that the classifier may answer otherwise than the reference: the last step, or
    feedback. The confidence from which an answer stands follows from it."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence with which the bound is kept."""
    over_texts: int = Field(default=1000, ge=0)
    """The bound holds for the next so many texts themselves; 0: in the long run, which short streams may exceed."""
    until_known: Literal["escalate", "below_confidence"] = "escalate"
    """What happens while too few labels are known to keep the bound: every text goes on, or only those below
    `below_confidence`, and then nothing is promised."""
    below_confidence: Share = 0.9
    """An answer of a model between the classifier and the last step is unsure below this confidence."""
    max_rate: Share = 1.0
    """Largest share of texts in the window that go on. The least sure go first; the others keep the classifier's
    answer, marked `unsure`, outside the bound."""
    window_seconds: PositiveSeconds = 3600.0
    """Window over which that share is taken."""
    audit_rate: float = Field(default=0.02, ge=0, le=1)
    """Share of all texts, drawn at random, that the last step answers too, however sure the classifier is. They show
    how often it is right on this traffic. Only texts that may go there are drawn."""
    learn_after: int | None = Field(default=None, ge=20)
    """Train a candidate after so many new labels; empty: only on command. Needs `keep_texts`."""
    learn_from: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """Names of keys whose texts may be learned from together; empty: never those of more than one key."""


class PruningRule(StrictModel):
    keep_tokens: Tokens
    """About how many prompt tokens stay: system messages and the newest turns. The oldest turns are removed first."""


class DegradeRule(StrictModel):
    """One step down, taken when no target could answer in full. Steps are tried in their order.

    `constrained`: a shorter answer or a smaller context. `reduced_scope`: the system messages and the last user message
    alone. `static`: `text` as the answer, without any model. Chat and completions only.
    """

    step: Literal["constrained", "reduced_scope", "static"]
    """What this step gives up."""
    max_output_tokens: Tokens | None = None
    """Longest answer of this step."""
    keep_tokens: Tokens | None = None
    """Largest context of this step, for `constrained`."""
    text: str | None = Field(default=None, min_length=1)
    """The answer of a `static` step: what the caller can do now."""

    @model_validator(mode="after")
    def _is_complete(self) -> "DegradeRule":
        limits = self.max_output_tokens is not None or self.keep_tokens is not None
        if self.step == "static" and (self.text is None or limits):
            raise ValueError("a static step has text, and nothing else")
        if self.step != "static" and self.text is not None:
            raise ValueError(f"a {self.step} step has no text: only a static one answers by itself")
        if self.step == "constrained" and not limits:
            raise ValueError("a constrained step needs max_output_tokens or keep_tokens")
        if self.step == "reduced_scope" and self.keep_tokens is not None:
            raise ValueError("reduced_scope keeps the last user message alone: use constrained for keep_tokens")
        return self


ContentSearch = Literal["off", "personal_data"]

STRUCTURED: tuple[PersonalKind, ...] = (
    "email",
    "phone",
    "payment_card",
    "iban",
    "bic",
    "national_id",
    "passport",
    "driver_license",
    "medical_record",
    "date_of_birth",
    "ip_address",
    "mac_address",
    "crypto_wallet",
    "credentials",
)
"""What has a form of its own, so that patterns and check digits find nearly all of it."""


class PersonalDataRule(StrictModel):
    """Requests that hold personal data are bound, whatever key and header allow.

    All that a model would read is searched before the request is routed. What could not be searched (it took too long,
    it is an image, the detector failed) is bound too.
    """

    content: ContentSearch = "off"
    """`personal_data` searches the requests of every route that does not say otherwise."""
    kinds: tuple[PersonalKind, ...] = Field(default=STRUCTURED, min_length=1)
    """Kinds of personal data that count. `postal_address` and `person_name` are found in part only, so they are not
    among the defaults."""
    bound: str = "onsite"
    """What binds such a request: onsite or region:XX."""
    detector: Literal["patterns", "presidio"] = "patterns"
    """`presidio` needs the extra of that name and a language model for it."""
    timeout_seconds: PositiveSeconds = 2.0
    """Longest search; a request that takes longer is bound."""

    @field_validator("bound")
    @classmethod
    def _binds(cls, value: str) -> str:
        if Residency.parse(value).kind == "any":
            raise ValueError("a bound of 'any' binds nothing: use onsite or region:XX, or set content to off")
        return check_residency(value)
