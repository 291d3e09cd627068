"""The application: which path leads where, and how errors look."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from appliance import __version__
from appliance.api.auth import Authenticator
from appliance.api.caller_dialect import respond_error
from appliance.api.endpoints.admin import AdminEndpoints
from appliance.api.endpoints.classifiers import ClassifierEndpoints
from appliance.api.endpoints.explain import ExplainEndpoints
from appliance.api.endpoints.feedback import FeedbackEndpoints, FeedbackStore
from appliance.api.endpoints.gemini import GeminiEndpoints
from appliance.api.endpoints.jobs import JobEndpoints
from appliance.api.endpoints.messages import MessagesEndpoints
from appliance.api.endpoints.openai import OpenAIEndpoints, ResponsesEndpoints
from appliance.api.endpoints.saved_tasks import SavedTaskEndpoints
from appliance.api.endpoints.tasks import TaskEndpoints
from appliance.api.error_middleware import ErrorMiddleware
from appliance.api.intake import RequestIntake
from appliance.api.protocols import LedgerReader, MetricsPage, SnapshotSource
from appliance.config import ServerSettings
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, NotFound, RequestError
from appliance.jobs.manager import JobManager
from appliance.quality.candidates import EncoderClient
from appliance.router.protocols import RequestPipeline
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.store import KnownTasks, SavedTasks


@dataclass(frozen=True, slots=True, kw_only=True)
class AppDeps:
    """What the HTTP API is built over."""

    pipeline: Callable[[], RequestPipeline]
    """Called once for each request, so that a reload may replace it."""
    auth: Authenticator
    state: SnapshotSource
    ledger: LedgerReader
    metrics: MetricsPage
    server: ServerSettings
    reload: Callable[[], Awaitable[JsonObject]]
    """Reads the configuration again and says what is in force."""
    task_fits: TaskCalibrationStore = field(default_factory=TaskCalibrationStore)
    """Calibrations of tasks. The default remembers them while the program runs, as does that of `saved_tasks`."""
    saved_tasks: SavedTasks = field(default_factory=SavedTasks)
    jobs: JobManager | None = None
    """Files and batches. None: there are no such paths."""
    encoders: EncoderClient | None = None
    """The program of the classifiers. None: every call about them says that there is none."""
    learning: FeedbackStore | None = None
    clock: Callable[[], float] = time.monotonic
    """The clock that snapshots are dated with, in seconds."""
    wall_clock: Callable[[], float] = time.time


def create_app(deps: AppDeps) -> FastAPI:
    """The HTTP API over `deps`."""
    intake = RequestIntake(
        pipeline=deps.pipeline,
        auth=deps.auth,
        max_body_bytes=deps.server.max_body_bytes,
        clock=deps.clock,
        wall_clock=deps.wall_clock,
    )
    # No interactive documentation: its pages load scripts from elsewhere, and requests travel verbatim anyway.
    app = FastAPI(
        title="Appliance",
        version=__version__,
        openapi_url=None,
        routes=_all_routes(deps, intake),
        redirect_slashes=False,
        # Other errors, defects included, are answered by ErrorMiddleware.
        exception_handlers={
            HTTPException: _on_http_error,
            RequestValidationError: _on_invalid,
        },
    )
    app.add_middleware(ErrorMiddleware)
    return app


def _all_routes(deps: AppDeps, intake: RequestIntake) -> list[BaseRoute]:
    known, max_body_bytes = KnownTasks(deps.task_fits, deps.saved_tasks), deps.server.max_body_bytes
    admin = AdminEndpoints(intake, deps.state, deps.ledger, deps.metrics, deps.reload)
    return [
        *_routes(intake, admin, deps.ledger, known),
        *_task_routes(SavedTaskEndpoints(intake, known, max_body_bytes)),
        *([] if deps.jobs is None else _job_routes(JobEndpoints(intake, deps.jobs))),
        *_classifier_routes(ClassifierEndpoints(intake, deps.encoders, max_body_bytes, deps.learning)),
        *_feedback_routes(FeedbackEndpoints(intake, deps.learning)),
    ]


def _routes(intake: RequestIntake, admin: AdminEndpoints, ledger: LedgerReader, known: KnownTasks) -> list[BaseRoute]:
    """Plain routes: endpoints take the request and return the response, with no model in between for each message."""
    openai, tasks = OpenAIEndpoints(intake), TaskEndpoints(intake, known)
    messages, responses, gemini = MessagesEndpoints(intake), ResponsesEndpoints(intake), GeminiEndpoints(intake)
    explain = ExplainEndpoints(intake, ledger, known)
    return [
        Route("/v1/chat/completions", openai.create_chat_completion, methods=["POST"]),
        Route("/v1/completions", openai.create_completion, methods=["POST"]),
        Route("/v1/embeddings", openai.create_embeddings, methods=["POST"]),
        Route("/v1/decisions", tasks.create_decision, methods=["POST"]),
        Route("/v1/decisions/batch", tasks.create_decision_batch, methods=["POST"]),
        Route("/v1/decisions/calibrate", tasks.calibrate_task, methods=["POST"]),
        Route("/v1/systemone", tasks.create_systemone_decision, methods=["POST"]),
        Route("/v1/extract", tasks.extract_fields, methods=["POST"]),
        Route("/v1/messages", messages.create_message, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/responses", responses.create_response, methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"]),
        Route(
            "/v1/models",
            _by_dialect(openai.list_models, anthropic=messages.list_models, gemini=gemini.list_models),
            methods=["GET"],
        ),
        Route("/v1/models/{name:path}", gemini.run_action, methods=["POST"]),
        Route(
            "/v1/models/{name:path}",
            _by_dialect(openai.get_model, anthropic=messages.get_model, gemini=gemini.get_model),
            methods=["GET"],
        ),
        Route("/v1beta/models", gemini.list_models, methods=["GET"]),
        Route("/v1beta/models/{name:path}", gemini.run_action, methods=["POST"]),
        Route("/v1beta/models/{name:path}", gemini.get_model, methods=["GET"]),
        Route("/v1/explain", explain.explain_request, methods=["POST"]),
        Route("/v1/explain/{decision_id}", explain.get_decision, methods=["GET"]),
        Route("/healthz", admin.show_health, methods=["GET"]),
        Route("/readyz", admin.show_readiness, methods=["GET"]),
        Route("/metrics", admin.show_metrics, methods=["GET"]),
        Route("/admin/reload", admin.reload_settings, methods=["POST"]),
    ]


def _task_routes(tasks: SavedTaskEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/tasks", tasks.save_task, methods=["POST"]),
        Route("/v1/tasks", tasks.list_tasks, methods=["GET"]),
        Route("/v1/tasks/{name:path}", tasks.get_task, methods=["GET"]),
        Route("/v1/tasks/{name:path}", tasks.delete_task, methods=["DELETE"]),
    ]


def _job_routes(jobs: JobEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/files", jobs.upload_file, methods=["POST"]),
        Route("/v1/files", jobs.list_files, methods=["GET"]),
        Route("/v1/files/{file_id}", jobs.get_file, methods=["GET"]),
        Route("/v1/files/{file_id}", jobs.delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", jobs.get_file_content, methods=["GET"]),
        Route("/v1/batches", jobs.create_batch, methods=["POST"]),
        Route("/v1/batches", jobs.list_batches, methods=["GET"]),
        Route("/v1/batches/{batch_id}", jobs.get_batch, methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", jobs.cancel_batch, methods=["POST"]),
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
        Route("/v1/classifiers", classifiers.train_classifier, methods=["POST"]),
        Route("/v1/classifiers", classifiers.list_classifiers, methods=["GET"]),
        Route(one, classifiers.get_classifier, methods=["GET"]),
        Route(one, classifiers.delete_classifier, methods=["DELETE"]),
        Route(f"{one}/evaluate", classifiers.evaluate_classifier, methods=["POST"]),
        Route(f"{one}/rollback", classifiers.roll_back_classifier, methods=["POST"]),
        Route(f"{one}/learn", classifiers.start_learning, methods=["POST"]),
        Route(f"{one}/training", classifiers.get_training, methods=["GET"]),
        Route(f"{one}/training", classifiers.cancel_training, methods=["DELETE"]),
    ]


def _feedback_routes(feedback: FeedbackEndpoints) -> list[BaseRoute]:
    return [
        Route("/v1/feedback", feedback.add_feedback, methods=["POST"]),
        Route("/v1/examples", feedback.forget_examples, methods=["DELETE"]),
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
    return respond_error(ours, http.state.dialect, http.state.request_id)


async def _on_invalid(http: Http, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return respond_error(
        RequestError(f"{place}: {first['msg']}", param=place), http.state.dialect, http.state.request_id
    )
