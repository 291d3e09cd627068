"""Everything before the first call: a request becomes a profile, a route and an order of targets."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from appliance.config import Policy, RouteRule
from appliance.core import Decision, Profile, Request, Target, Usage
from appliance.errors import ApplianceError, BudgetExceeded, Forbidden
from appliance.router.capacity.request_load import load_of, prefix_of
from appliance.router.cost import onsite_usd, reserve_usd
from appliance.router.deps import RouterDeps
from appliance.router.profile import LlmProfile, profile
from appliance.router.residency import bound_by
from appliance.router.routing.match import route_of
from appliance.router.routing.rank import TargetEstimate, no_route, rank
from appliance.router.routing.truncation import AS_IT_IS, PromptTrim, shape_of


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """A decision with what the walk needs besides."""

    decision: Decision
    rule: RouteRule | None
    """None where the request may use no route."""
    shape: PromptTrim
    """What its calls are cut down to."""
    refusal: ApplianceError | None
    """What the caller is told where no attempt is left."""
    prefix: Hashable
    leaves_free: float


class Router:
    """One policy, applied. Reads what is known now and changes nothing."""

    def __init__(self, policy: Policy, means: RouterDeps) -> None:
        self._policy = policy
        self._means = means

    def decide(
        self, request: Request, prompt_tokens: int, output_tokens: int | None, opinion: LlmProfile | str
    ) -> RoutingResult:
        """`opinion`: of a local model, or why there is none."""
        made = profile(
            request,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            profiler=self._policy.defaults.profiler,
            opinion=opinion,
        )
        prefix, leaves_free = prefix_of(request), self._policy.capacity.reserved_for_bound
        over_quota = self._means.memory.of_late.over_quota(self._policy.routes, self._means.clock())
        try:
            rule = route_of(request, made, self._policy, over_quota)
        except (Forbidden, BudgetExceeded) as refusal:
            decision = Decision(request.decision_id, request.id, made, no_route(request, self._policy))
            return RoutingResult(decision, None, AS_IT_IS, refusal, prefix, leaves_free)
        return self._place(request, made, rule, shape_of(rule), prefix)

    def again(self, request: Request, decided: RoutingResult, prompt_tokens: int, output_tokens: int) -> RoutingResult:
        """The same request by the same route, shorter than before."""
        assert decided.rule is not None
        made = replace(decided.decision.profile, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        return self._place(request, made, decided.rule, decided.shape, decided.prefix)

    def _place(
        self, request: Request, made: Profile, rule: RouteRule, shape: PromptTrim, prefix: Hashable
    ) -> RoutingResult:
        snapshot, leaves_free = self._means.state.snapshot, self._policy.capacity.reserved_for_bound
        prompt_tokens, output_tokens = shape.prompt_tokens(made.prompt_tokens), shape.output_tokens(made.output_tokens)
        # Bound in any way, it neither overflows nor leaves places to others.
        is_bound = bound_by(request, rule, self._policy)[0].kind != "any"
        outlooks = {
            target.name: self._outlook(request, target, rule, prefix, prompt_tokens, output_tokens, is_bound)
            for target in snapshot.targets
        }
        ranking = rank(request, made, self._policy, snapshot, outlooks, rule)
        decision = Decision(request.decision_id, request.id, made, ranking.route)
        return RoutingResult(decision, rule, shape, ranking.refusal, prefix, leaves_free)

    def _outlook(
        self,
        request: Request,
        target: Target,
        rule: RouteRule,
        prefix: Hashable,
        prompt_tokens: int,
        output_tokens: int,
        is_bound: bool,
    ) -> TargetEstimate:
        means, now = self._means, self._means.clock()
        experience, of_late = means.memory.experience, means.memory.of_late
        load = load_of(
            experience,
            request,
            target.name,
            prefix=prefix,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            leaves_free=self._policy.capacity.reserved_for_bound,
        )
        prediction = means.admission.predict(target, load, may_leave=not is_bound, first=is_bound)
        until = means.breakers.blocked_until(target.name, now)
        tokens = experience.tokens.correct(target.name, prompt_tokens)
        counts_money = rule.score is not None or rule.max_cost_usd is not None
        return TargetEstimate(
            prediction,
            tokens,
            experience.tokens.at_least(target.name, prompt_tokens),
            None if until is None else until - now,
            self._usd(target, tokens, output_tokens) if counts_money else 0.0,
            None if rule.max_cost_per_success_usd is None else of_late.usd_per_success(rule.name, target.name, now),
        )

    def _usd(self, target: Target, prompt_tokens: int, output_tokens: int) -> float:
        if target.location == "hosted" and target.price is not None:
            return reserve_usd(target.price, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        view = self._means.state.snapshot.engines.get(target.name)
        usage = Usage(prompt_tokens, output_tokens)
        return onsite_usd(target, view, usage, self._means.cost, self._means.cores) or 0.0
