"""Why: what would be decided for a body (POST, nothing is called or recorded), and what was (GET, from the ledger)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.api.intake import Reader, RequestIntake
from appliance.api.json_responses import respond_json
from appliance.api.protocols import LedgerReader
from appliance.core import Caller, Decision, ParsedRequest, TaskCall
from appliance.errors import NotFound
from appliance.tasks import chat, completions, embeddings
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.extract import extraction
from appliance.tasks.saved_tasks import Shape
from appliance.tasks.store import KnownTasks
from appliance.wire.registry import INBOUND
from appliance.wire.strict_fields import wrong

READERS: Mapping[str, Reader[Any]] = {
    "chat": chat.read_chat_request,
    "completions": completions.read_completion_request,
    "decisions": openai_shape.read_decision_request,
    "decisions/batch": openai_shape.read_decision_batch,
    "systemone": systemone.read_systemone_request,
    "extract": extraction.read_extract_request,
    "embeddings": embeddings.read_embedding_request,
    **{endpoint: partial(chat.read_translated_chat, dialect) for endpoint, dialect in INBOUND.items()},
}

_SHAPES: Mapping[str, Shape] = {
    "decisions": "decisions",
    "decisions/batch": "decisions",
    "systemone": "systemone",
    "extract": "extract",
}

_DECISION_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


class ExplainEndpoints:
    def __init__(self, intake: RequestIntake, ledger: LedgerReader, known: KnownTasks) -> None:
        self._intake = intake
        self._known = known
        self._ledger = ledger

    async def explain_request(self, http: Http) -> Response:
        """Body: that of any endpoint, with `endpoint` naming it ("chat" where it is left out)."""
        caller = self._intake.auth.authenticate(http.headers)
        inbound = await self._intake.read_request(http, lambda body: read_any_request(self._meant(body, caller)))
        pipeline = self._intake.pipeline
        request = await pipeline.with_pii_scan(inbound.request)
        decision = pipeline.decide(request, prompt_tokens=inbound.prompt_tokens, output_tokens=inbound.output_tokens)
        return respond_json(_story(decision, inbound.request.endpoint, len(inbound.calls)))

    def _meant(self, body: Mapping[str, Any], caller: Caller) -> Mapping[str, Any]:
        """What a body that names a saved task stands for."""
        shape = _SHAPES.get(str(body.get("endpoint")).removeprefix("/v1/"))
        if shape is None:
            return body
        return {**self._known.expanded(body, shape, caller)}

    async def get_decision(self, http: Http) -> Response:
        """A decision that was made; other callers' decisions do not exist for a key without the scope admin."""
        caller = self._intake.auth.authenticate(http.headers)
        decision_id = http.path_params["decision_id"]
        story = await self._ledger.read_decision(decision_id) if _DECISION_ID.fullmatch(decision_id) else None
        if story is None or ("admin" not in caller.scopes and story.get("key_id") != caller.key_id):
            raise NotFound(
                f"decision {decision_id[:80]!r} is not known: its answer had the id in the header x-appliance-decision"
            )
        return respond_json(story)


def read_any_request(body: Mapping[str, Any]) -> tuple[ParsedRequest, Sequence[TaskCall]]:
    """Read a body that says itself for which endpoint it is meant. Raises RequestError as that endpoint would."""
    named = body.get("endpoint", "chat")
    name = named.removeprefix("/v1/").replace("chat/completions", "chat") if isinstance(named, str) else ""
    if name not in READERS:
        raise wrong("endpoint", named, f"it must be one of {', '.join(READERS)}")
    return READERS[name]({field: value for field, value in body.items() if field != "endpoint"})


def _story(decision: Decision, endpoint: str, calls: int) -> Mapping[str, Any]:
    route = decision.route
    return {
        "dry_run": True,
        "request_id": decision.request_id,
        "endpoint": endpoint,
        "calls": calls,
        "profile": asdict(decision.profile),
        "route": route.name,
        "policy_version": route.policy_version,
        "pinned": route.pinned,
        "residency": str(route.residency),
        "residency_reason": route.residency_reason,
        "attempts": [
            {"target": attempt.target.name, "location": attempt.target.location, "reason": attempt.reason}
            for attempt in route.attempts
        ],
        "escalations": [attempt.target.name for attempt in route.escalations],
        "excluded": [{"target": item.target, "reason": item.reason} for item in route.excluded],
        "stage": route.stage,
        "latency_budget_seconds": route.latency_budget_seconds,
        "answer_budget_seconds": route.answer_budget_seconds,
        "max_wait_seconds": route.max_wait_seconds,
        "total_seconds": route.total_seconds,
        "max_attempts": route.max_attempts,
        "max_cost_usd": route.max_cost_usd,
    }
