"""What a request is, before any model is called: task, complexity, format, language, length.

Three profilers behind one function, chosen in the policy: rules, learned weights, and a local model's opinion. All are
pure: the opinion was asked for before (`pipeline.asking`), and where there is none the rules speak.
"""

from typing import Final

from appliance.core import LatencyClass, Profile, Profiler, Request
from appliance.router.profile import linear_model, rules
from appliance.router.profile.estimate import LlmProfile, ProfileEstimate
from appliance.router.profile.language import guess_language
from appliance.router.profile.llm_prompt import make_profile_guess
from appliance.router.profile.text_sample import TextSample, take_sample

__all__ = ["LlmProfile", "check_profiler", "profile"]

DEFAULT_OUTPUT_TOKENS: Final = 256
PERSONAL_DATA: Final = "personal_data"
"""Risk class of a request in which some was found."""


def profile_request(
    request: Request,
    *,
    prompt_tokens: int,
    output_tokens: int | None,
    profiler: Profiler = "rules",
    llm_profile: LlmProfile | str = "no local model was asked",
) -> Profile:
    """The profile of `request`. Token counts are the caller's estimates; None: the usual length of an answer.

    `llm_profile`: what a local model said, or why there is nothing; only the profiler "llm" looks at it. Raises
    ConfigError where "learned" is chosen and its weights cannot be used; `check_profiler` says so beforehand.
    """
    sample = take_sample(request.text)
    made = _guess(request, sample, prompt_tokens, profiler, llm_profile)
    return Profile(
        task=made.task,
        complexity=made.complexity,
        format=request.format,
        latency_class=_latency_class(request),
        language=guess_language(sample.text, sample.words),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens if output_tokens is not None else DEFAULT_OUTPUT_TOKENS,
        risk=PERSONAL_DATA if request.content is not None and request.content.kinds else "normal",
        reasons=made.reasons,
    )


def check_profiler(profiler: Profiler) -> None:
    """Load what `profiler` needs, which takes milliseconds. Raises ConfigError where that cannot be used."""
    if profiler == "learned":
        linear_model.load_shipped_weights()


def _guess(
    request: Request, sample: TextSample, prompt_tokens: int, profiler: Profiler, llm_profile: LlmProfile | str
) -> ProfileEstimate:
    if profiler == "learned":
        return linear_model.guess_profile(request, sample, linear_model.load_shipped_weights())
    by_rules = rules.guess_profile(request, sample, prompt_tokens=prompt_tokens)
    return by_rules if profiler == "rules" else make_profile_guess(llm_profile, by_rules)


def _latency_class(request: Request) -> LatencyClass:
    if request.latency_class is not None:
        return request.latency_class
    return "batch" if "inputs" in request.body or "texts" in request.body else "interactive"
