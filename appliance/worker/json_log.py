"""A worker's log: one JSON object a line on stderr. Never a prompt, a reply or a text that was classified."""

import logging
import sys
import time

import orjson


def log(event: str, **fields: object) -> None:
    """Write one line. Values that JSON does not know are written as their `str`."""
    line = orjson.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
    sys.stderr.buffer.write(line + b"\n")
    sys.stderr.buffer.flush()


def log_library_warnings() -> None:
    """Write what libraries log, from WARNING on, in the same form."""
    logging.basicConfig(level=logging.WARNING, handlers=[_JsonLogHandler()], force=True)


class _JsonLogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log("library", logger=record.name, level=record.levelname.lower(), reason=record.getMessage())
