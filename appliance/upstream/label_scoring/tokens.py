"""Label scores from a server that tells the logprobs of chosen tokens (vLLM's `logprob_token_ids`).

It stands in for the `/labels` of our own engine: same request, same reply, so decisions need not know whom they ask.
Each text costs a call to `/tokenize` and one read of a single token for each place where the labels part; the prompt
they have in common is in the server's prefix cache after the first.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.core import EgressPermit, Target, UpstreamReply, Usage
from appliance.errors import BackendGarbage, BackendRefused, BackendTimeout, RequestError
from appliance.upstream.base import Transport, close_response
from appliance.upstream.error_mapping import error_of_status
from appliance.upstream.label_scoring.tree import LabelTreeNode, LabelTreeScoring, Tokens, mass, tree
from appliance.wire.dialect import WireRequest
from appliance.wire.usage import read_payload_usage, write_usage

PATH: Final = "/labels"
_MOST_TOKEN_IDS: Final = 128
"""That one read may ask for."""
_AT_ONCE: Final = 16
_MOST_TREES: Final = 512
_LEAST_LOGPROB: Final = -9_999.0
_NO_THOUGHTS: Final = {"enable_thinking": False}
_TOKENIZE: Final = "/tokenize"


def is_label_request(wire_request: WireRequest) -> bool:
    return wire_request.outgoing.path == PATH and "token_logprobs" in wire_request.target.abilities


class TokenLabelScorer:
    """Keeps what labels are in tokens, by server and wording: they seldom change."""

    def __init__(self) -> None:
        self._trees: OrderedDict[tuple[Any, ...], tuple[Tokens, LabelTreeNode]] = OrderedDict()
        self._ends: dict[str, int] = {}

    async def send(
        self, transport: Transport, wire_request: WireRequest, *, permit: EgressPermit | None, seconds: float
    ) -> UpstreamReply:
        """The scores of every item. Raises what a plain exchange with the target raises."""
        started = time.monotonic()
        body = orjson.loads(wire_request.body)
        call = _Call(transport, wire_request.target, permit, str(body.get("cache_salt", "")), body.get("priority"))
        try:
            async with asyncio.timeout(seconds):
                trees = {name: await self._tree(call, body, labels) for name, labels in body["label_sets"].items()}
                results = await _all(_item(call, body, item, *trees[item["labels"]]) for item in body["items"])
        except TimeoutError as error:
            raise BackendTimeout(f"{wire_request.target.name} did not answer within {seconds:.1f} s") from error
        payload = {
            "object": "list",
            "model": wire_request.target.model,
            "results": results,
            "usage": write_usage(call.usage),
        }
        taken = time.monotonic() - started
        return UpstreamReply(payload, call.usage, taken, taken)

    async def _tree(
        self, call: "_Call", body: Mapping[str, Any], labels: Sequence[str]
    ) -> tuple[Tokens, LabelTreeNode]:
        """What the cue ends with in tokens, and where the labels part after it."""
        cue = str(body.get("cue", ""))
        key = (call.target.name, call.target.variant, call.target.address, cue, tuple(labels))
        found = self._trees.get(key)
        if found is None:
            stem = cue.strip()
            gap = cue[len(cue.rstrip()) :]
            texts = [stem, *(f"{stem}{gap}{label}" for label in labels)]
            base, *spelled = await _all(call.tokens({"prompt": text, "add_special_tokens": False}) for text in texts)
            if any(one[: len(base)] != base for one in spelled):
                base = _common(spelled)  # the cue's last token grows together with the label's first
            try:
                branch = tree([one[len(base) :] for one in spelled], await self._end(call))
            except ValueError as error:
                raise RequestError(
                    f"some of the labels are the same to {call.target.name}; keep one of them"
                ) from error
            found = self._trees[key] = (base, branch)
            if len(self._trees) > _MOST_TREES:
                self._trees.popitem(last=False)
        return found

    async def _end(self, call: "_Call") -> int:
        """The token that ends a turn: the first that a finished message has and an unfinished one has not."""
        target = call.target.name
        if target not in self._ends:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ways = ({"continue_final_message": False}, {"continue_final_message": True})
            shape = {"messages": messages, "add_generation_prompt": False, "chat_template_kwargs": _NO_THOUGHTS}
            whole, begun = await _all(call.tokens({**shape, **way}) for way in ways)
            self._ends[target] = whole[len(begun)] if len(whole) > len(begun) else -1
        return self._ends[target]


async def _item(
    call: "_Call", body: Mapping[str, Any], item: Mapping[str, Any], base: Tokens, root: LabelTreeNode
) -> Mapping[str, Any]:
    """One result as `/labels` gives it; what is wrong with this text alone stands in its place."""
    names = body["label_sets"][item["labels"]]
    own = item.get("messages") or [{"role": "user", "content": item["content"]}]
    messages = [*(body.get("messages") or ()), *own]
    try:
        prompt = await _prompt(call, messages, str(body.get("cue", "")), base, is_open=bool(body.get("open_turn")))
        scoring = LabelTreeScoring(root, len(names))
        while scoring.due:
            reads = await _all(call.read((*prompt, *place.prefix), tuple(place.children)) for place, _ in scoring.due)
            scoring.give(reads)
    except (BackendRefused, RequestError) as error:
        return error.to_openai()
    whole = mass(scoring.scores)
    labels = [
        {
            "label": name,
            "logprob": max(score, _LEAST_LOGPROB),
            "probability": math.exp(score - whole) if math.isfinite(whole) else 1 / len(names),
        }
        for name, score in zip(names, scoring.scores, strict=True)
    ]
    return {"labels": labels, "label_mass": min(1.0, math.exp(whole)), "prompt_tokens": len(prompt), "cached_tokens": 0}


async def _prompt(
    call: "_Call", messages: Sequence[Mapping[str, Any]], cue: str, base: Tokens, *, is_open: bool
) -> Tokens:
    """The tokens of everything before the label. `is_open`: the cue follows the last message within its turn."""
    shape: dict[str, Any] = {"chat_template_kwargs": _NO_THOUGHTS}
    if not is_open:
        return (*await call.tokens({"messages": messages, "add_generation_prompt": True, **shape}), *base)
    last = {**messages[-1], "content": f"{messages[-1]['content']}{cue.rstrip()}"}
    shape |= {"messages": [*messages[:-1], last], "add_generation_prompt": False, "continue_final_message": True}
    return await call.tokens(shape)


class _Call:
    """The exchanges that one request for labels comes to."""

    def __init__(
        self, transport: Transport, target: Target, permit: EgressPermit | None, salt: str, priority: int | None
    ) -> None:
        self._transport, self.target, self._permit = transport, target, permit
        self._common = {"model": target.model} | ({"priority": priority} if priority is not None else {})
        self._salt = {"cache_salt": salt} if salt else {}
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self.usage = Usage()

    async def tokens(self, body: Mapping[str, Any]) -> Tokens:
        payload = await self._post(_TOKENIZE, at_root=True, body={**body, "model": self.target.model})
        found = payload.get("tokens")
        if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
            raise BackendGarbage(f"{self.target.name} answered no tokens where it was asked for them")
        return tuple(found)

    async def read(self, prompt: Tokens, wanted: Tokens) -> Mapping[int, float]:
        """The logprob of each of `wanted` after `prompt`."""
        parts = [wanted[start : start + _MOST_TOKEN_IDS] for start in range(0, len(wanted), _MOST_TOKEN_IDS)]
        found: dict[int, float] = {}
        for part in await _all(self._read(prompt, part) for part in parts):
            found |= part
        return found

    async def _read(self, prompt: Tokens, wanted: Tokens) -> Mapping[int, float]:
        body = {
            **self._common,
            **self._salt,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "logprob_token_ids": wanted,
            "return_tokens_as_token_ids": True,
        }
        payload = await self._post("/completions", body)
        self.usage += read_payload_usage(payload)
        try:
            rows = payload["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(name.removeprefix("token_id:")): float(value) for name, value in rows.items()}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BackendGarbage(f"{self.target.name} gave no logprobs of the tokens it was asked for") from error

    async def _post(self, path: str, body: Mapping[str, Any], *, at_root: bool = False) -> dict[str, Any]:
        async with self._gate:
            response = await self._transport.open(
                self.target, path, orjson.dumps(body), permit=self._permit, at_root=at_root
            )
            try:
                raw = await response.aread()
            finally:
                await close_response(response)
        if response.status_code != 200:
            raise error_of_status(self.target, response.status_code, raw, response.headers, time.time())
        try:
            payload = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BackendGarbage(f"{self.target.name} answered {raw[:60]!r}, which is not JSON") from error
        if not isinstance(payload, dict):
            raise BackendGarbage(f"{self.target.name} answered a JSON {type(payload).__name__}")
        return payload


async def _all(work: Any) -> list[Any]:
    """All of it at once, in order; the first failure ends the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _common(rows: Sequence[Tokens]) -> Tokens:
    shared = 0
    while all(len(row) > shared and row[shared] == rows[0][shared] for row in rows):
        shared += 1
    return rows[0][:shared]
