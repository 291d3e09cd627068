"""The program's log: one JSON object a line on stderr. Never a text that was classified."""

import logging
import sys
import time
from typing import Any

import orjson


def log(event: str, **fields: Any) -> None:
    line = orjson.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
    sys.stderr.buffer.write(line + b"\n")
    sys.stderr.buffer.flush()


class EncoderJsonLog(logging.Handler):
    """What libraries warn of, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        log("library", logger=record.name, level=record.levelname.lower(), reason=record.getMessage())
