"""A stand-in provider for benchmarks, as a process: answers every question with its first option, fills every schema.

`python -m scripts.benchmarks.provider` prints its base URL; `GET /counts` tells calls, tokens and cost.
"""

import argparse
import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tests.standin import StandIn


def reply(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole payload for a call that is not streamed."""
    if path == "/decisions":
        return {"model": body["model"], "answers": [_answer(question) for question in body["questions"]]}
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    text = "A short answer." if schema is None else json.dumps(_instance(schema))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "cmpl-1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    values = [choice["value"] for choice in question["choices"]]
    probabilities = [{"value": value, "probability": 0.9 if value == values[0] else 0.1} for value in values]
    return {
        "type": "choice",
        "name": question.get("name"),
        "choice": values[0],
        "confidence": 0.9,
        "probabilities": probabilities,
    }


def _instance(schema: Mapping[str, Any]) -> Any:
    match schema.get("type"):
        case "object":
            return {name: _instance(one) for name, one in schema.get("properties", {}).items()}
        case "number" | "integer":
            return 12
        case _:
            return "text"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds-per-token", type=float, default=0.0)
    parser.add_argument("--words", type=int, default=6, help="of a streamed answer; one event each")
    options = parser.parse_args()
    text = " ".join(["word"] * options.words)
    async with StandIn(text=text, seconds_per_token=options.seconds_per_token, reply=reply) as provider:
        print(provider.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
