"""Logs: one line per event on stderr, JSON for machines or plain text for people, the same for ours and libraries'.

Ours come from `structlog.stdlib.get_logger(__name__)` or `logging.getLogger(__name__)`; both end in one renderer.
"""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.types import Processor

from appliance.telemetry.redaction import scrub_event

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

# They log each request, statement or migration at info: the ledger and the metrics tell that better.
_CHATTY = ("aiohttp.access", "alembic", "httpcore", "httpx", "sqlalchemy", "uvicorn.access")
# They bring handlers of their own, which would print a second time in another format.
_WITH_HANDLERS = ("uvicorn", "uvicorn.access", "uvicorn.error", "uvicorn.asgi", "sqlalchemy", "sqlalchemy.engine")


class LogLineHandler(logging.StreamHandler[TextIO]):
    """Our handler, told apart from others' by its class so that a second set-up replaces it."""


def setup_logging(level: Level = "info", format: Format = "auto", *, stream: TextIO | None = None) -> None:
    """Send every log line to `stream` (stderr), scrubbed. `auto` is console on a terminal and JSON elsewhere.

    May be called again, as a reload does. Start uvicorn with `log_config=None`, or it sets up its own.
    """
    stream = sys.stderr if stream is None else stream
    is_json = format == "json" or (format == "auto" and not stream.isatty())
    known: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = LogLineHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *known],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, scrub_event, _renderer(is_json)],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, LogLineHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _WITH_HANDLERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).propagate = True
    for name in _CHATTY:
        logging.getLogger(name).setLevel("DEBUG" if level == "debug" else "WARNING")
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *known,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _renderer(is_json: bool) -> Processor:
    if is_json:
        return structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    return structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
