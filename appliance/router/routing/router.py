"""Everything before the first call: a request becomes a profile, a route and an order of targets."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from appliance.config import Policy, RouteRule
from appliance.core import Decision, Profile, Request, Target, Usage
from appliance.errors import ApplianceError, BudgetExceeded, Forbidden
from appliance.router.capacity.request_load import make_request_load, prompt_prefix_key
from appliance.router.cost import estimate_onsite_usd, worst_case_usd
from appliance.router.deps import RouterDeps
from appliance.router.profile import LlmProfile, profile_request
from appliance.router.residency import resolve_route_residency
from appliance.router.routing.match import match_route
from appliance.router.routing.rank import TargetEstimate, make_empty_route, rank_targets
from appliance.router.routing.truncation import NO_TRIM, PromptTrim, make_trim


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """A decision with what the walk needs besides."""

    decision: Decision
    rule: RouteRule | None
    """None where the request may use no route."""
    trim: PromptTrim
    """What its calls are cut down to."""
    refusal: ApplianceError | None
    """What the caller is told where no attempt is left."""
    prefix: Hashable
    reserved_share: float


class Router:
    """One policy, applied. Reads what is known now and changes nothing."""

    def __init__(self, policy: Policy, deps: RouterDeps) -> None:
        self._policy = policy
        self._deps = deps

    def decide(
        self, request: Request, prompt_tokens: int, output_tokens: int | None, llm_profile: LlmProfile | str
    ) -> RoutingResult:
        """`llm_profile`: of a local model, or why there is none."""
        profiled = profile_request(
            request,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            profiler=self._policy.defaults.profiler,
            llm_profile=llm_profile,
        )
        prefix, reserved_share = prompt_prefix_key(request), self._policy.capacity.reserved_for_bound
        over_quota = self._deps.stats.windows.over_quota(self._policy.routes, self._deps.clock())
        try:
            rule = match_route(request, profiled, self._policy, over_quota)
        except (Forbidden, BudgetExceeded) as refusal:
            decision = Decision(request.decision_id, request.id, profiled, make_empty_route(request, self._policy))
            return RoutingResult(decision, None, NO_TRIM, refusal, prefix, reserved_share)
        return self._place(request, profiled, rule, make_trim(rule), prefix)

    def redecide(
        self, request: Request, decided: RoutingResult, prompt_tokens: int, output_tokens: int
    ) -> RoutingResult:
        """The same request by the same route, shorter than before."""
        assert decided.rule is not None
        profiled = replace(decided.decision.profile, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        return self._place(request, profiled, decided.rule, decided.trim, decided.prefix)

    def _place(
        self, request: Request, profiled: Profile, rule: RouteRule, trim: PromptTrim, prefix: Hashable
    ) -> RoutingResult:
        snapshot, reserved_share = self._deps.state.snapshot, self._policy.capacity.reserved_for_bound
        prompt_tokens, output_tokens = (
            trim.prompt_tokens(profiled.prompt_tokens),
            trim.output_tokens(profiled.output_tokens),
        )
        # Bound in any way, it neither overflows nor leaves places to others.
        is_bound = resolve_route_residency(request, rule, self._policy)[0].kind != "any"
        estimates = {
            target.name: self._estimate(request, target, rule, prefix, prompt_tokens, output_tokens, is_bound)
            for target in snapshot.targets
        }
        ranking = rank_targets(request, profiled, self._policy, snapshot, estimates, rule)
        decision = Decision(request.decision_id, request.id, profiled, ranking.route)
        return RoutingResult(decision, rule, trim, ranking.refusal, prefix, reserved_share)

    def _estimate(
        self,
        request: Request,
        target: Target,
        rule: RouteRule,
        prefix: Hashable,
        prompt_tokens: int,
        output_tokens: int,
        is_bound: bool,
    ) -> TargetEstimate:
        deps, now = self._deps, self._deps.clock()
        estimators, windows = deps.stats.estimators, deps.stats.windows
        load = make_request_load(
            estimators,
            request,
            target.name,
            prefix=prefix,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            reserved_share=self._policy.capacity.reserved_for_bound,
        )
        prediction = deps.admission.predict(target, load, can_fall_back=not is_bound, is_residency_bound=is_bound)
        until = deps.breakers.blocked_until(target.name, now)
        tokens = estimators.tokens.correct(target.name, prompt_tokens)
        counts_money = rule.score is not None or rule.max_cost_usd is not None
        return TargetEstimate(
            prediction,
            tokens,
            estimators.tokens.at_least(target.name, prompt_tokens),
            None if until is None else until - now,
            self._usd(target, tokens, output_tokens) if counts_money else 0.0,
            None if rule.max_cost_per_success_usd is None else windows.usd_per_success(rule.name, target.name, now),
        )

    def _usd(self, target: Target, prompt_tokens: int, output_tokens: int) -> float:
        if target.location == "hosted" and target.price is not None:
            return worst_case_usd(target.price, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        view = self._deps.state.snapshot.engines.get(target.name)
        usage = Usage(prompt_tokens, output_tokens)
        return estimate_onsite_usd(target, view, usage, self._deps.cost, self._deps.cores) or 0.0
