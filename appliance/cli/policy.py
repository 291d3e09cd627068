"""appliance policy: check, show and compare the rules that route requests, and ask what they would do with one."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from appliance.api.endpoints.explain import read_any_request
from appliance.cli.options import ConfigOption, JsonOption, load_node_catalog, resolve_data_dir
from appliance.cli.output import exit_on_error, fail, say, say_json
from appliance.config import (
    DEFAULT_POLICY_PATH,
    EngineModel,
    NodeConfig,
    Policy,
    list_provider_targets,
    load_config,
    load_policy,
)
from appliance.config.policy_diff import list_policy_changes
from appliance.core import Ability, Caller, Profile, Request, Residency, Snapshot, Target
from appliance.errors import ApplianceError, ConfigError, UnknownModel
from appliance.router.capacity.predictor import NOT_PREDICTED, Prediction
from appliance.router.cost import worst_case_usd
from appliance.router.pii.scanner import PiiScanner, make_detector
from appliance.router.profile import profile_request
from appliance.router.request_builder import make_request
from appliance.router.routing.rank import RankedTargets, TargetEstimate, rank_targets

Local = Literal["ready", "busy", "down"]

_LOCAL: dict[Local, Prediction] = {
    "ready": Prediction(0.0, 0.0, fits_kv=True, ready=True, reason="taken to be idle"),
    "busy": Prediction(86_400.0, 86_400.0, fits_kv=False, ready=True, reason="taken to be full"),
    "down": Prediction(0.0, 0.0, fits_kv=False, ready=False, reason="taken to be down", can_enter=False),
}
_ANY_ENGINE: frozenset[Ability] = frozenset({"chat", "completions", "labels", "decisions", "json_schema", "logprobs"})
"""What an engine of this node can do with a model that is not in the catalogue."""


def check_command(
    path: Annotated[Path | None, typer.Argument(help="A policy file; empty: the one the configuration names.")] = None,
    config_path: ConfigOption = None,
) -> None:
    """Say whether a policy is valid for this configuration; a mistake is named with its line and field."""
    try:
        config = load_config(config_path)
        path = _path_of(path, config)
        policy = load_policy(path, _targets(config))
        make_detector(policy)
    except ConfigError as error:
        fail(str(error))
    say(f"{path}: valid, {len(policy.routes)} routes, version {policy.version}")


def show_command(
    path: Annotated[Path | None, typer.Argument(help="A policy file; empty: the one that comes along.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every default filled in.")] = False,
) -> None:
    """Print a policy: its text, or as JSON what the node makes of it."""
    policy = exit_on_error(lambda: load_policy(path))
    if as_json:
        say_json({"version": policy.version, **policy.model_dump(mode="json", exclude_none=True)})
    else:
        say((path or DEFAULT_POLICY_PATH).read_text().rstrip())


def diff_command(
    old_path: Annotated[Path, typer.Argument(metavar="OLD", help="A policy file.")],
    new_path: Annotated[Path, typer.Argument(metavar="NEW", help="The one to compare it with.")],
) -> None:
    """Say in words what changes from one policy to another: routes that come, go and move, and every field."""
    old, new = exit_on_error(lambda: load_policy(old_path)), exit_on_error(lambda: load_policy(new_path))
    lines = list_policy_changes(old, new)
    say("\n".join(lines) if lines else "they say the same")


def explain_command(
    path: Annotated[Path, typer.Argument(metavar="POLICY", help="A policy file.")],
    body_path: Annotated[Path, typer.Argument(metavar="BODY", help="A request as JSON; `endpoint` may name its API.")],
    config_path: ConfigOption = None,
    key: Annotated[str, typer.Option(help="Name of the API key it comes with.")] = "anonymous",
    tier: Annotated[str | None, typer.Option(help="The key's tier.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="A header, as NAME=VALUE; may be given often.")] = None,
    local: Annotated[str, typer.Option(help="What to take the on-site engines for: ready, busy or down.")] = "ready",
    as_json: JsonOption = False,
) -> None:
    """Say which route a request would take, which targets in which order, and why; nothing is called."""
    try:
        config = load_config(config_path)
        targets = _targets(config)
        policy = load_policy(path, targets)
        caller = _caller(config, key, tier)
        request, made = _read(body_path, caller, header or [], policy)
        ranking = _rank(request, made, policy, targets, local)
    except ApplianceError as error:
        fail(str(error))
    if ranking.refusal is not None and isinstance(ranking.refusal, UnknownModel):
        fail(ranking.refusal.message)
    if as_json:
        say_json(_facts(made, ranking))
    else:
        _say_story(made, ranking)


def _path_of(path: Path | None, config: NodeConfig) -> Path:
    return path or (Path(config.policy).expanduser() if config.policy else DEFAULT_POLICY_PATH)


def _targets(config: NodeConfig) -> tuple[Target, ...]:
    """What the configuration has: the engines' models as the catalogue knows them, then the providers' models."""
    return (*(_engine_target(config, wish) for wish in config.engine.wanted_models), *list_provider_targets(config))


def _engine_target(config: NodeConfig, wish: EngineModel) -> Target:
    if wish.path is not None or wish.name.endswith(".gguf") or Path(wish.name).is_dir():
        name = wish.name if wish.path is not None else Path(wish.name).stem
        abilities, quality, context = _ANY_ENGINE, None, wish.context_tokens
    else:
        catalog = load_node_catalog(resolve_data_dir(None, config))
        spec = exit_on_error(lambda: catalog.get_model(wish.name))
        name, abilities, quality = spec.name, frozenset(spec.abilities), spec.quality
        context = min(spec.context_tokens, wish.context_tokens or spec.context_tokens)
    return Target(
        name=f"onsite/{name}",
        location="onsite",
        dialect="openai",
        address="unix:",
        model=name,
        abilities=abilities,
        context_tokens=context,
        quality=quality if wish.quality is None else wish.quality,
    )


def _caller(config: NodeConfig, name: str, tier: str | None) -> Caller:
    """The configured key of that name, or a stranger of that name who may do everything."""
    found = next((key for key in config.keys if key.name == name), None)
    if found is None:
        return Caller(name, name, tier=tier)
    routes = None if found.routes is None else frozenset(found.routes)
    return Caller(name, name, residency=Residency.parse(found.residency), tier=tier or found.tier, routes=routes)


def _read(path: Path, caller: Caller, given: list[str], policy: Policy) -> tuple[Request, Profile]:
    """The request as the API would read it. Raises RequestError for what is wrong with it."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read as JSON: {error}")
    if not isinstance(body, dict):
        fail(f"{path}: a request is a JSON object")
    headers = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            fail(f"--header {pair!r}: write NAME=VALUE")
        headers[name.strip().lower()] = value.strip()
    asked, calls = read_any_request(body)
    request = make_request(
        asked, headers=headers, caller=caller, request_id="explain", now=time.monotonic(), wall=time.time()
    )
    if policy.searches_content:
        request = asyncio.run(PiiScanner(policy.residency, make_detector(policy)).search(request))
    return request, profile_request(
        request,
        prompt_tokens=max(call.prompt_tokens for call in calls),
        output_tokens=max(call.output_tokens for call in calls),
        profiler=policy.defaults.profiler,
    )


def _rank(request: Request, made: Profile, policy: Policy, targets: tuple[Target, ...], local: str) -> RankedTargets:
    prediction = next((known for name, known in _LOCAL.items() if name == local), None)
    if prediction is None:
        fail(f"--local {local!r}: it must be one of {', '.join(_LOCAL)}")
    outlooks = {
        target.name: TargetEstimate(
            prediction if target.provider is None else NOT_PREDICTED,
            made.prompt_tokens,
            made.prompt_tokens // 2,
            usd=0.0
            if target.price is None
            else worst_case_usd(target.price, prompt_tokens=made.prompt_tokens, output_tokens=made.output_tokens),
        )
        for target in targets
    }
    return rank_targets(request, made, policy, Snapshot(0.0, targets), outlooks)


def _facts(made: Profile, ranking: RankedTargets) -> dict[str, Any]:
    route = ranking.route
    return {
        "profile": {"task": made.task, "complexity": made.complexity, "risk": made.risk, "reasons": made.reasons},
        "route": route.name,
        "policy_version": route.policy_version,
        "residency": str(route.residency),
        "residency_reason": route.residency_reason,
        "attempts": [{"target": one.target.name, "reason": one.reason} for one in route.attempts],
        "escalations": [one.target.name for one in route.escalations],
        "excluded": [{"target": one.target, "reason": one.reason} for one in route.excluded],
        "refusal": None if ranking.refusal is None else ranking.refusal.message,
    }


def _say_story(made: Profile, ranking: RankedTargets) -> None:
    route = ranking.route
    say(f"profile    {'; '.join(made.reasons)}; {made.prompt_tokens} prompt tokens")
    say(f"route      {route.name} (policy {route.policy_version})")
    say(f"residency  {route.residency}: {route.residency_reason}")
    for number, attempt in enumerate(route.attempts, 1):
        say(f"attempt {number}  {attempt.target.name}: {attempt.reason}")
    for escalation in route.escalations:
        say(f"unsure     {escalation.target.name}: {escalation.reason}")
    for one in route.excluded:
        say(f"left out   {one.target}: {one.reason}")
    if ranking.refusal is not None:
        say(f"refused    {ranking.refusal.status} {ranking.refusal.code}: {ranking.refusal.message}")
