"""Searching a request for personal data before it is routed, in the time it is given.

Whatever goes wrong (too slow, a defect, something that is not text) is told as not searched, and that binds as personal
data would: under load as well as otherwise.
"""

import asyncio
import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol

import structlog

from appliance.config import PersonalDataRule, Policy
from appliance.core import HealthAlerts, NoAlerts, PersonalKind, PiiScanResult, Request
from appliance.core.json_types import JsonObject
from appliance.errors import ConfigError
from appliance.router.pii.text_extractor import TextExtractor, extract_text, split_chunks

AT_ONCE_CHARACTERS: Final = 8_192
AT_ONCE_DIGITS: Final = 512
"""A text of less is searched on the event loop, in less than a millisecond; more of it, in a thread. Digits are what
takes time: every number is looked at by itself."""

SEARCHES_AT_ONCE: Final = 2
"""Threads that search share one interpreter; more of them would only take turns. One that hangs keeps its place, so
hanging ones cannot pile up: requests that find no place in time are bound."""

_MODULES: Final[Mapping[str, str]] = {
    "patterns": "appliance.router.pii.patterns",
    "presidio": "appliance.router.pii.presidio",
}

_CODE: Final = "content_not_searched"

_log = structlog.get_logger(__name__)


class PiiDetector(Protocol):
    """Tells which kinds of personal data a text holds. Used by several threads at once."""

    @property
    def is_quick(self) -> bool:
        """Whether a short text takes so little time that it needs no thread."""

    def kinds_in(self, text: str) -> tuple[PersonalKind, ...]: ...


def make_detector(policy: Policy) -> PiiDetector | None:
    """The detector that `policy` wants; None where no route has its requests searched. Takes a while: not on the loop.

    Raises ConfigError where it is not installed.
    """
    if not policy.searches_content:
        return None
    name = policy.residency.detector
    try:
        # Not at the top: the tables of number formats take up to 16 MB, and most nodes do not search.
        module: Any = importlib.import_module(_MODULES[name])
        made: PiiDetector = module.make(policy.residency.kinds)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the detector {name!r} is not installed ({error.name} is missing): install the extra, "
            f'`pip install "appliance[{name}]"`, or use detector = "patterns"',
            field="residency.detector",
        ) from error
    return made


class PiiScanner:
    """Searches requests as one policy has it. One for each policy; all is called on the event loop."""

    def __init__(
        self, rules: PersonalDataRule, detector: PiiDetector | None, alerts: HealthAlerts | None = None
    ) -> None:
        self._rules = rules
        self._detector = detector
        self._alerts = alerts or NoAlerts()
        self._in_trouble = True
        """Whether there may be a warning that the next search makes untrue."""
        self._places = asyncio.Semaphore(SEARCHES_AT_ONCE)

    async def search(self, request: Request) -> Request:
        """The request with its content filled in. Raises nothing but CancelledError."""
        if self._detector is None:
            return replace(request, content=PiiScanResult((), "there is no detector"))
        try:
            content = self._at_once(request, self._detector) or await self._in_thread(request.body, self._detector)
        except _NotSearched as error:
            reason = str(error)
            self._in_trouble = True
            self._alerts.warn(_CODE, f"requests are bound because their content was not searched: {reason}")
            return replace(request, content=PiiScanResult((), reason))
        if self._in_trouble:
            self._in_trouble = False
            self._alerts.clear(_CODE)
        return replace(request, content=content)

    def _at_once(self, request: Request, detector: PiiDetector) -> PiiScanResult | None:
        """None where that would keep the loop for too long."""
        if not detector.is_quick or len(request.text) > AT_ONCE_CHARACTERS:
            return None
        with _failing_safely():
            read = extract_text(request.body, limit_characters=AT_ONCE_CHARACTERS)
            if read is None or _count_digits(read.text) > AT_ONCE_DIGITS:
                return None
            return _content(detector.kinds_in(read.text), read)

    async def _in_thread(self, body: JsonObject, detector: PiiDetector) -> PiiScanResult:
        seconds = self._rules.timeout_seconds
        stop = threading.Event()
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
                return await _run(partial(_search, body, detector, stop), self._places.release)
        except TimeoutError as error:
            raise _NotSearched(f"the search took longer than {seconds:g} s") from error
        finally:
            stop.set()


def _search(body: JsonObject, detector: PiiDetector, stop: threading.Event) -> PiiScanResult:
    """In a thread. One kind is enough to bind, so the first piece that has any is the last."""
    with _failing_safely():
        read = extract_text(body)
        assert read is not None
        for piece in split_chunks(read.text):
            kinds = detector.kinds_in(piece)
            if kinds or stop.is_set():
                return _content(kinds, read)
            time.sleep(0)  # the event loop's turn
        return _content((), read)


def _content(kinds: tuple[PersonalKind, ...], read: TextExtractor) -> PiiScanResult:
    if not read.attachments:
        return PiiScanResult(kinds)
    what = "an image, sound or file" if read.attachments == 1 else f"{read.attachments} images, sounds or files"
    return PiiScanResult(kinds, what)


class _NotSearched(Exception):
    """Says why; never what the text was."""


@contextlib.contextmanager
def _failing_safely() -> Iterator[None]:
    """A detector may fail in any way. What its error says may quote the text, so only its type is told."""
    try:
        yield
    except Exception as error:  # whatever it is, the request is bound
        name = type(error).__name__
        _log.error("the detector of personal data failed; the request is bound", error=name)
        raise _NotSearched(f"the detector failed ({name})") from None


async def _run(search: Callable[[], PiiScanResult], done: Callable[[], None]) -> PiiScanResult:
    """`search` in a thread of its own. `done` is called on the loop when it has ended, waited for or not.

    The thread is a daemon: one that hangs keeps neither a request waiting nor the node from ending.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[PiiScanResult] = loop.create_future()

    def end(content: PiiScanResult | _NotSearched) -> None:
        done()
        if result.done():
            return
        if isinstance(content, PiiScanResult):
            result.set_result(content)
        else:
            result.set_exception(content)

    def work() -> None:
        content: PiiScanResult | _NotSearched
        try:
            content = search()
        except _NotSearched as error:
            content = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(end, content)

    threading.Thread(target=work, name="search for personal data", daemon=True).start()
    return await result


def _count_digits(text: str) -> int:
    return sum(map(text.count, "0123456789"))
