"""One exception tree. HTTP status, code and retry hint live on the class, so no other package knows them.

ApplianceError                       500  internal_error         a defect of this program; the log has the traceback
├── RequestError                     400  invalid_request        the caller must change the request
│   ├── ContextTooLong               400  context_length_exceeded  prompt and answer do not fit the target's context
│   ├── Unsupported                  400  unsupported_feature    no target can do what the request asks for
│   ├── BodyTooLarge                 413  body_too_large         the body is longer than `server.max_body_bytes`
│   ├── UnknownModel                 404  model_not_found        no target has the name in `model`
│   └── NotFound                     404  not_found              the path, decision, file or name does not exist
├── Unauthorized                     401  invalid_api_key        no API key was sent, or it is not known
├── Forbidden                        403  forbidden              the API key lacks a scope or a route
│   └── ResidencyRefused             403  residency_bound        no target inside the request's residency can answer
├── Busy                             429  capacity_exceeded      waiting helps; carries retry_after_seconds
│   ├── RateLimited                  429  rate_limit_exceeded    the key's requests a minute are used up
│   └── BudgetExceeded               429  budget_exceeded        a daily cap or a cost ceiling is reached
├── Unavailable                      503  unavailable            no allowed target is up
│   ├── EngineBusy                   503  engine_busy            an engine's own bounded queue is full
│   ├── LedgerUnavailable            503  ledger_unavailable     hosted spend cannot be recorded, so none is made
│   ├── JobsUnavailable              503  jobs_unavailable       the store of files and batches cannot be read
│   └── StorageFull                  507  storage_full           the disk has no room for files and results
├── DeadlineExceeded                 504  deadline_exceeded      all attempts together took longer than the route allows
├── BackendError                     502  backend_error          a target did not answer as it should
│   ├── BackendRefused               (upstream's) upstream_rejected      a 4xx that would fail anywhere; never retried
│   │   └── BackendIncapable         (upstream's) upstream_rejected      404, 405, 413: this target cannot, another may
│   ├── BackendAuth                  502  backend_auth           our key for the target is missing or wrong
│   ├── BackendOverloaded            503  backend_overloaded     429, 503, 529 from upstream
│   ├── BackendTimeout               504  backend_timeout        a target was too slow
│   ├── BackendUnreachable           502  backend_unreachable    no connection to a target
│   ├── BackendGarbage               502  backend_garbage        a reply that is not what the dialect promises
│   ├── RejectedReply                502  reply_rejected         an answer came and did not pass verification
│   └── StreamBroken                 502  stream_broken          after the first byte; nothing may be retried
├── ClientGone                       499  client_closed_request  the client left before its answer was complete
└── OperatorError                    500  configuration_error    a mistake in the node's set-up; shown at start
    ├── ConfigError                  500  invalid_configuration  names file, line and field
    ├── ModelFileError               500  model_file_error       missing, truncated, corrupt
    ├── PullError                    500  pull_failed            a model could not be fetched
    └── EngineFailed                 500  engine_failed          did not start or died; carries its last log lines
"""

from collections.abc import Mapping
from typing import Any


class ApplianceError(Exception):
    """Base of every error this project raises on purpose.

    `message` names the value and the remedy. `param` is the request field at fault, or None.
    `retry_after_seconds` is set where waiting helps. `status` may be overridden per instance for errors that
    carry an upstream's status.
    """

    status: int = 500
    code: str = "internal_error"
    kind: str = "server_error"
    """The `type` of OpenAI's error object."""
    fallback: bool = False
    """Whether another target may be tried after this error."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.headers: Mapping[str, str] = {}
        """What the decision says of itself, where there was one: the headers that every answer carries."""
        if status is not None:
            self.status = status

    def to_openai(self) -> Mapping[str, Any]:
        """The body of an OpenAI-shaped error response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class RequestError(ApplianceError):
    status, code, kind = 400, "invalid_request", "invalid_request_error"


class ContextTooLong(RequestError):
    code = "context_length_exceeded"


class Unsupported(RequestError):
    code = "unsupported_feature"


class BodyTooLarge(RequestError):
    status, code = 413, "body_too_large"


class UnknownModel(RequestError):
    status, code = 404, "model_not_found"


class NotFound(RequestError):
    status, code = 404, "not_found"


class Unauthorized(ApplianceError):
    status, code, kind = 401, "invalid_api_key", "authentication_error"


class Forbidden(ApplianceError):
    status, code, kind = 403, "forbidden", "permission_error"


class ResidencyRefused(Forbidden):
    code = "residency_bound"


class Busy(ApplianceError):
    status, code, kind = 429, "capacity_exceeded", "rate_limit_error"


class BudgetExceeded(Busy):
    code = "budget_exceeded"
    fallback = True


class RateLimited(Busy):
    code = "rate_limit_exceeded"


class Unavailable(ApplianceError):
    status, code = 503, "unavailable"


class EngineBusy(Unavailable):
    code = "engine_busy"
    fallback = True


class LedgerUnavailable(Unavailable):
    code = "ledger_unavailable"
    fallback = True


class JobsUnavailable(Unavailable):
    code = "jobs_unavailable"


class StorageFull(Unavailable):
    status, code = 507, "storage_full"


class DeadlineExceeded(ApplianceError):
    status, code = 504, "deadline_exceeded"


class BackendError(ApplianceError):
    status, code = 502, "backend_error"
    fallback = True
    may_have_cost: bool = False
    """Whether the target may have done (and billed) work before it failed, so that its cost is unknown, not nothing."""


class BackendRefused(BackendError):
    code, kind = "upstream_rejected", "invalid_request_error"
    fallback = False


class BackendIncapable(BackendRefused):
    """The target cannot answer this request, and nothing is wrong with the request: another target may answer it."""

    fallback = True
    refuses_all: bool = False
    """Whether it would refuse every request: the target knows no such model, or has no such endpoint."""


class BackendAuth(BackendError):
    code = "backend_auth"


class BackendOverloaded(BackendError):
    status, code = 503, "backend_overloaded"


class BackendTimeout(BackendError):
    status, code = 504, "backend_timeout"
    may_have_cost = True


class BackendUnreachable(BackendError):
    code = "backend_unreachable"


class BackendGarbage(BackendError):
    code = "backend_garbage"
    may_have_cost = True


class RejectedReply(BackendError):
    code = "reply_rejected"


class StreamBroken(BackendError):
    code = "stream_broken"
    fallback = False
    may_have_cost = True


class ClientGone(ApplianceError):
    status, code = 499, "client_closed_request"


class OperatorError(ApplianceError):
    code = "configuration_error"


class ConfigError(OperatorError):
    """A mistake in a configuration or policy file, with its place."""

    code = "invalid_configuration"

    def __init__(
        self, message: str, *, file: str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (place, field, message) if part))
        self.file, self.line, self.field = file, line, field


class ModelFileError(OperatorError):
    code = "model_file_error"


class PullError(OperatorError):
    code = "pull_failed"


class EngineFailed(OperatorError):
    code = "engine_failed"
