"""Spoiled bodies of every chat dialect to the real application: no defect, no hang, nothing refused is sent out."""

import asyncio
import time
from collections import Counter
from typing import Final

import httpx

from scripts.conform.outcomes import Outcome
from tests.api.mutation import Sent, is_in_shape, mutations
from tests.wire.matrix.stages import OUT_HEADER, OUTBOUND, fuzzed_node

COUNT: Final = 10_000
"""For each inbound dialect."""
SECONDS: Final = 10.0
"""Longer than that is a hang: a stand-in answers at once."""
_ENOUGH: Final = 50
"""Failures of one kind that are told."""

SUITE: Final = "fuzz"


def dialect_of(sent: Sent) -> str:
    return {"/v1/chat/completions": "chat", "/v1/responses": "responses"}.get(sent.path, sent.dialect)


async def outcomes(count: int, seed: int = 1) -> list[Outcome]:
    """One outcome for each dialect's passed bodies in all, and one for each that failed."""
    made: list[Outcome] = []
    passed: Counter[str] = Counter()
    async with fuzzed_node() as (url, sent_out, wrongs), httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
        number = 0
        for sent in mutations(seed, 40 * count):
            dialect = dialect_of(sent)
            if passed[dialect] >= count:
                if number >= 4 * count:
                    break
                continue
            number += 1
            reason = await wrong_with(client, sent, sent_out, wrongs, number)
            passed[dialect] += 1
            if reason and len(made) < _ENOUGH:
                made.append(Outcome(SUITE, f"{dialect} {number}", "failed", reason, repr(sent.body)[:2000]))
    return [Outcome(SUITE, f"{dialect}: {many} bodies", "passed") for dialect, many in passed.items()] + made


async def wrong_with(
    client: httpx.AsyncClient, sent: Sent, sent_out: list[object], wrongs: list[str], number: int
) -> str:
    """What is wrong with the answer to a body, in words; nothing where nothing is.

    `number` says by which outbound dialect it leaves, if it does.
    """
    before, refused, started = len(sent_out), len(wrongs), time.monotonic()
    try:
        async with asyncio.timeout(SECONDS):
            answer = await client.post(sent.path, json=sent.body, headers={OUT_HEADER: str(number % len(OUTBOUND))})
    except (TimeoutError, httpx.HTTPError) as error:
        return f"no answer after {time.monotonic() - started:.1f} s: {error!r}"
    if answer.status_code == 200:
        return ""
    if answer.status_code not in (400, 404, 413, 502):
        return f"HTTP {answer.status_code}: {answer.text[:300]}"
    if not is_in_shape(sent, answer.status_code, answer.json()):
        return f"an error in no shape of its API: {answer.text[:300]}"
    if answer.status_code != 502 and len(sent_out) > before and len(wrongs) == refused:
        return f"sent out, and then refused: {answer.text[:300]}"
    return ""
