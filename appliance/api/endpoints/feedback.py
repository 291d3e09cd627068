"""What callers say of answers: `POST /v1/feedback`, and `DELETE /v1/examples` for what was kept of a key's texts.

`POST /v1/feedback` takes {decision_id, index, label}: what was right for one text of a decision that went through a
route's cascade (`index` 0 where it was one text). Or {input, classifier, label}: a labelled text of the caller's own.
A key sees its own decisions; the scope admin sees all. `DELETE /v1/examples` removes the labels and texts of the
caller's key, with `?key=NAME` (scope admin) those of another one, with `?classifier=classifier/NAME` of one alone.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.api.body import read_body
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.core import ANYWHERE, strictest
from appliance.errors import Forbidden, RequestError, Unavailable
from appliance.router.request_builder import read_residency
from appliance.wire.json_body import parse_body

_MAX_BODY_BYTES: Final = 1_000_000
_MOST_LABEL_CHARS: Final = 200
_MOST_TEXT_CHARS: Final = 20_000
_MOST_INDEX: Final = 10_000


class FeedbackStore(Protocol):
    """What keeps labels and looks after candidates."""

    async def add_feedback(
        self, owner: str, decision_id: str, index: int, label: str, *, sees_all: bool
    ) -> Mapping[str, Any]: ...

    async def add_example(
        self, owner: str, classifier: str, text: str, label: str, residency: str
    ) -> Mapping[str, Any]: ...

    async def forget_owner(self, owner: str, classifier: str | None = None) -> int: ...

    async def describe_classifier(self, name: str) -> Mapping[str, Any] | None: ...

    async def start_training(self, name: str) -> Mapping[str, Any]: ...

    async def forget_classifier(self, name: str) -> None: ...


class FeedbackEndpoints:
    """`learning` is None where nothing is kept: then every call says so."""

    def __init__(self, intake: RequestIntake, learning: FeedbackStore | None) -> None:
        self._intake, self._learning = intake, learning

    async def add_feedback(self, http: Http) -> Response:
        caller = self._intake.authenticate(http)
        body = parse_body(await read_body(http.receive, http.headers, _MAX_BODY_BYTES))
        label = _text(body, "label", _MOST_LABEL_CHARS)
        if body.get("decision_id") is None and (body.get("input") is not None or body.get("classifier") is not None):
            classifier, text = _text(body, "classifier", _MOST_LABEL_CHARS), _text(body, "input", _MOST_TEXT_CHARS)
            bound = strictest(caller.residency, read_residency(http.headers) or ANYWHERE)
            return respond_json(await self._store.add_example(caller.key_id, classifier, text, label, str(bound)))
        decision_id, index = _text(body, "decision_id", _MOST_LABEL_CHARS), _index(body)
        sees_all = "admin" in caller.scopes
        result = await self._store.add_feedback(caller.key_id, decision_id, index, label, sees_all=sees_all)
        return respond_json(result)

    async def forget_examples(self, http: Http) -> Response:
        caller, query = self._intake.authenticate(http), http.query_params
        owner = query.get("key", caller.key_id)
        if owner != caller.key_id and "admin" not in caller.scopes:
            raise Forbidden("the examples of another key are removed with the scope admin alone")
        gone = await self._store.forget_owner(owner, query.get("classifier"))
        return respond_json({"key": owner, "removed": gone})

    @property
    def _store(self) -> FeedbackStore:
        if self._learning is None:
            raise Unavailable("this program keeps no labels: ask a node that `appliance serve` runs, and see /healthz")
        return self._learning


def _text(body: Mapping[str, Any], field: str, most: int) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{field} is {value!r:.40}: it must be a text", param=field)
    if len(value) > most:
        raise RequestError(f"{field} has {len(value)} characters: at most {most}", param=field)
    return value if field == "input" else value.strip()


def _index(body: Mapping[str, Any]) -> int:
    value = body.get("index", 0)
    if type(value) is not int or not 0 <= value < _MOST_INDEX:
        raise RequestError(f"index is {value!r:.40}: it must be a text's place in its batch, from 0", param="index")
    return value
