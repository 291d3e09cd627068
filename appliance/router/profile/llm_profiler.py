"""Asking a model of this node what a request is, before anything is decided. Brief, on this node, and never in the way.

It takes a slot like any call and gives it back before the request itself is admitted, so it can hold nobody up; where
there is no free place, no answer in time or no engine, the rules speak and the reason is told.
"""

import hashlib
from collections import OrderedDict
from typing import Final

from appliance.core import Profiler, Request, Target
from appliance.errors import ApplianceError, BackendUnreachable
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.deps import RouterDeps
from appliance.router.profile.estimate import LlmProfile, given_task
from appliance.router.profile.llm_prompt import (
    SEQUENCES,
    estimate_prompt_tokens,
    make_question,
    read_llm_profile,
    take_excerpt,
)
from appliance.upstream import client

SECONDS: Final = 0.3
"""What a profile may add to a request's time: less than anybody notices before a first word."""

REST_SECONDS: Final = 10.0
"""After a model did not answer in time it is left alone this long: else every request would lose SECONDS."""

MOST_OPINIONS: Final = 4096
"""Kept, a hundred bytes each."""

_KIND: Final = "profile"


class LlmProfiler:
    """Opinions of a local model, where the policy wants them; those of late are kept, by caller and text."""

    def __init__(self, profiler: Profiler, deps: RouterDeps) -> None:
        self._profiler = profiler
        self._deps = deps
        self._kept: OrderedDict[bytes, LlmProfile] = OrderedDict()
        self._rests_until = float("-inf")

    def known(self, request: Request) -> LlmProfile | str:
        """Without asking anybody: what an earlier request was told, or why there is nothing."""
        if self._profiler != "llm":
            return "no model is to be asked"
        if given_task(request) is not None:
            return "endpoint or format say the task"
        return self._recall(_key(request)) or "no model was asked about this text yet"

    async def llm_profile(self, request: Request) -> LlmProfile | str:
        """What a model of this node says within SECONDS, or why none did. Raises nothing but CancelledError."""
        if self._profiler != "llm" or given_task(request) is not None:
            return self.known(request)
        key = _key(request)
        kept = self._recall(key)
        if kept is not None:
            return kept
        target = self._able()
        if target is None:
            return "no engine of this node that scores labels is ready"
        now = self._deps.clock()
        if now < self._rests_until:
            return f"{target.name} was too slow or failed; asked again in {self._rests_until - now:.0f} s"
        try:
            llm_profile = await self._ask(target, request)
        except ApplianceError as error:
            return f"{target.name} was not asked or did not answer: {error.code}"
        self._keep(key, llm_profile)
        return llm_profile

    def _able(self) -> Target | None:
        """The first engine of this node that is up; servers that somebody else runs are not asked, not even on-site."""
        snapshot = self._deps.state.snapshot
        for target in snapshot.targets:
            view = snapshot.engines.get(target.name)
            is_own = target.location == "onsite" and target.provider is None and "labels" in target.abilities
            if is_own and view is not None and view.state == "ready":
                return target
        return None

    async def _ask(self, target: Target, request: Request) -> LlmProfile:
        deps, seen = self._deps, take_excerpt(request.text)
        load = RequestLoad(estimate_prompt_tokens(seen), SEQUENCES, share=SEQUENCES, kind=_KIND)
        # no waiting: whoever cannot be asked at once is not asked
        slot = await deps.admission.enter(
            target, load, is_residency_bound=False, wait_seconds=0.0, budget_seconds=SECONDS
        )
        try:
            salt = client.derive_cache_salt(request.caller.key_id)
            wire_request = client.write_request(target, make_question(seen), stream=False, salt=salt)
            reply = await client.send_request(deps.transports.local, wire_request, permit=None, seconds=SECONDS)
            return read_llm_profile(target, reply)
        except ApplianceError as error:
            self._rests_until = deps.clock() + REST_SECONDS
            if isinstance(error, BackendUnreachable):
                deps.admission.mark_suspect(target.name)
            raise
        finally:
            slot.release()

    def _recall(self, key: bytes) -> LlmProfile | None:
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def _keep(self, key: bytes, llm_profile: LlmProfile) -> None:
        self._kept[key] = llm_profile
        if len(self._kept) > MOST_OPINIONS:
            self._kept.popitem(last=False)


def _key(request: Request) -> bytes:
    """By caller as well, so that time does not tell one what another has sent. The text itself is not kept."""
    said = f"{request.caller.key_id}\n{take_excerpt(request.text)}"
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
