"""The application: which path leads where, and how errors look."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from appliance import __version__
from appliance.api.auth import Authenticator
from appliance.api.caller_dialect import error_response
from appliance.api.endpoints.admin import AdminEndpoints
from appliance.api.endpoints.classifiers import ClassifierEndpoints
from appliance.api.endpoints.explain import ExplainEndpoints
from appliance.api.endpoints.feedback import FeedbackEndpoints, FeedbackStore
from appliance.api.endpoints.gemini import GeminiEndpoints
from appliance.api.endpoints.jobs import JobEndpoints
from appliance.api.endpoints.messages import MessagesEndpoints
from appliance.api.endpoints.openai import OpenAIEndpoints
from appliance.api.endpoints.responses import ResponsesEndpoints
from appliance.api.endpoints.saved_tasks import SavedTaskEndpoints
from appliance.api.endpoints.tasks import TaskEndpoints
from appliance.api.error_middleware import ErrorMiddleware
from appliance.api.intake import RequestIntake
from appliance.api.protocols import LedgerReader, MetricsPage, SnapshotSource
from appliance.config import ServerSettings
from appliance.errors import ApplianceError, NotFound, RequestError
from appliance.jobs.manager import JobManager
from appliance.quality.candidates import EncoderClient
from appliance.router.protocols import RequestPipeline
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.store import KnownTasks, SavedTasks


def create_app(
    *,
    pipeline: Callable[[], RequestPipeline],
    auth: Authenticator,
    state: SnapshotSource,
    ledger: LedgerReader,
    metrics: MetricsPage,
    server: ServerSettings,
    reload: Callable[[], Awaitable[Mapping[str, Any]]],
    task_fits: TaskCalibrationStore | None = None,
    saved_tasks: SavedTasks | None = None,
    desk: JobManager | None = None,
    encoders: EncoderClient | None = None,
    learning: FeedbackStore | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> FastAPI:
    """The HTTP API over the given rooms. `pipeline` is called once for each request, so a reload may replace it.

    `task_fits` and `saved_tasks` remember tasks (None: while the program runs); `desk` keeps files and batches (None:
    there are none). `reload` reads the configuration again and says what is in force; `clock` must be the one that
    snapshots are dated with.
    """
    rim = RequestIntake(
        pipeline=pipeline, auth=auth, max_body_bytes=server.max_body_bytes, clock=clock, wall_clock=wall_clock
    )
    known = KnownTasks(task_fits or TaskCalibrationStore(), saved_tasks or SavedTasks())
    # No interactive documentation: its pages load scripts from elsewhere, and requests travel verbatim anyway.
    app = FastAPI(
        title="Appliance",
        version=__version__,
        openapi_url=None,
        routes=[
            *_routes(rim, AdminEndpoints(rim, state, ledger, metrics, reload), ledger, known),
            *_task_routes(SavedTaskEndpoints(rim, known, server.max_body_bytes)),
            *([] if desk is None else _job_routes(JobEndpoints(rim, desk))),
            *_classifier_routes(ClassifierEndpoints(rim, encoders, server.max_body_bytes, learning)),
            *_feedback_routes(FeedbackEndpoints(rim, learning)),
        ],
        redirect_slashes=False,
        # Errors of our own, and defects, are answered by the envelope.
        exception_handlers={
            HTTPException: _on_http_error,
            RequestValidationError: _on_invalid,
        },
    )
    app.add_middleware(ErrorMiddleware)
    return app


def _routes(rim: RequestIntake, admin: AdminEndpoints, ledger: LedgerReader, known: KnownTasks) -> list[BaseRoute]:
    """Plain routes: endpoints take the request and return the response, with no model in between for each message."""
    openai, tasks = OpenAIEndpoints(rim), TaskEndpoints(rim, known)
    messages, responses, gemini = MessagesEndpoints(rim), ResponsesEndpoints(rim), GeminiEndpoints(rim)
    explain = ExplainEndpoints(rim, ledger, known)
    return [
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
        Route("/v1/decisions", tasks.decisions, methods=["POST"]),
        Route("/v1/decisions/batch", tasks.batch, methods=["POST"]),
        Route("/v1/decisions/calibrate", tasks.calibrate, methods=["POST"]),
        Route("/v1/systemone", tasks.systemone, methods=["POST"]),
        Route("/v1/extract", tasks.extract, methods=["POST"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count, methods=["POST"]),
        Route(
            "/v1/models", _by_dialect(openai.models, anthropic=messages.models, gemini=gemini.models), methods=["GET"]
        ),
        Route("/v1/models/{name:path}", gemini.act, methods=["POST"]),
        Route(
            "/v1/models/{name:path}",
            _by_dialect(openai.model, anthropic=messages.model, gemini=gemini.model),
            methods=["GET"],
        ),
        Route("/v1beta/models", gemini.models, methods=["GET"]),
        Route("/v1beta/models/{name:path}", gemini.act, methods=["POST"]),
        Route("/v1beta/models/{name:path}", gemini.model, methods=["GET"]),
        Route("/v1/explain", explain.dry_run, methods=["POST"]),
        Route("/v1/explain/{decision_id}", explain.decision, methods=["GET"]),
        Route("/healthz", admin.healthz, methods=["GET"]),
        Route("/readyz", admin.readyz, methods=["GET"]),
        Route("/metrics", admin.metrics, methods=["GET"]),
        Route("/admin/reload", admin.reload, methods=["POST"]),
    ]


def _task_routes(tasks: SavedTaskEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/tasks", tasks.save, methods=["POST"]),
        Route("/v1/tasks", tasks.list, methods=["GET"]),
        Route("/v1/tasks/{name:path}", tasks.show, methods=["GET"]),
        Route("/v1/tasks/{name:path}", tasks.remove, methods=["DELETE"]),
    ]


def _job_routes(jobs: JobEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/files", jobs.upload, methods=["POST"]),
        Route("/v1/files", jobs.files, methods=["GET"]),
        Route("/v1/files/{file_id}", jobs.file, methods=["GET"]),
        Route("/v1/files/{file_id}", jobs.remove_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", jobs.content, methods=["GET"]),
        Route("/v1/batches", jobs.create, methods=["POST"]),
        Route("/v1/batches", jobs.batches, methods=["GET"]),
        Route("/v1/batches/{batch_id}", jobs.batch, methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", jobs.cancel, methods=["POST"]),
    ]


Endpoint = Callable[[Http], Awaitable[Response]]


def _by_dialect(openai: Endpoint, **others: Endpoint) -> Endpoint:
    """One path that several APIs have, each with its own answer."""

    async def answer(http: Http) -> Response:
        return await others.get(http.state.dialect, openai)(http)

    return answer


def _classifier_routes(classifiers: ClassifierEndpoints) -> list[BaseRoute]:
    one = "/v1/classifiers/{name}"
    return [
        Route("/v1/classifiers", classifiers.train, methods=["POST"]),
        Route("/v1/classifiers", classifiers.list, methods=["GET"]),
        Route(one, classifiers.show, methods=["GET"]),
        Route(one, classifiers.remove, methods=["DELETE"]),
        Route(f"{one}/evaluate", classifiers.evaluate, methods=["POST"]),
        Route(f"{one}/rollback", classifiers.roll_back, methods=["POST"]),
        Route(f"{one}/learn", classifiers.learn, methods=["POST"]),
        Route(f"{one}/training", classifiers.training, methods=["GET"]),
        Route(f"{one}/training", classifiers.cancel, methods=["DELETE"]),
    ]


def _feedback_routes(feedback: FeedbackEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/feedback", feedback.give, methods=["POST"]),
        Route("/v1/examples", feedback.forget, methods=["DELETE"]),
    ]


async def _on_http_error(http: Http, error: Exception) -> Response:
    """Paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    ours: ApplianceError
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        ours = RequestError(f"{http.method} is not a method of {http.url.path[:200]}: use {allowed}", status=405)
    elif error.status_code == 404:
        ours = NotFound(f"{http.url.path[:200]!r} does not exist here: the API is under /v1, for example /v1/models")
    else:
        ours = RequestError(str(error.detail), status=error.status_code)
    ours.headers = dict(error.headers or {})
    return error_response(ours, http.state.dialect, http.state.request_id)


async def _on_invalid(http: Http, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return error_response(
        RequestError(f"{place}: {first['msg']}", param=place), http.state.dialect, http.state.request_id
    )
