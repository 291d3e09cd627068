"""The HTTP API of a running node, as commands use it: what the node refuses ends the program with its sentence."""

import os
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import orjson
import typer

from appliance.cli.output import exit_on_error, fail
from appliance.config import load_config
from appliance.core.json_types import JsonObject

KEY_VARIABLE: Final = "APPLIANCE_KEY"
_SECONDS: Final = 60.0

UrlOption = Annotated[str | None, typer.Option(help="Where the node is; empty: as configured, on this machine.")]


def configured_url(config_path: Path | None) -> str:
    """The address of this machine's node as it is configured."""
    server = exit_on_error(lambda: load_config(config_path)).server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def read_key(option: str | None) -> str | None:
    """The API key of the command line, else of the environment."""
    return option or os.environ.get(KEY_VARIABLE)


class NodeApiClient:
    """Gets and sends JSON objects. Every failure ends the program."""

    def __init__(
        self, url: str | None, key: str | None, config_path: Path | None, timeout_seconds: float | None = _SECONDS
    ) -> None:
        """`url` None: as configured. `timeout_seconds` None: no limit, for work that takes a small machine minutes."""
        text = read_key(key)
        self._url = (url or configured_url(config_path)).rstrip("/")
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {text}"} if text else {})
        self._timeout_seconds = timeout_seconds
        # A proxy of the environment is for addresses elsewhere, not for this machine's own node.
        self._uses_proxy = url is not None

    def get(self, path: str) -> JsonObject:
        return self._send("GET", path)

    def post(self, path: str, body: JsonObject | None = None) -> JsonObject:
        return self._send("POST", path, body)

    def delete(self, path: str) -> JsonObject:
        return self._send("DELETE", path)

    def _send(self, method: str, path: str, body: JsonObject | None = None) -> JsonObject:
        try:
            reply = httpx.request(
                method,
                self._url + path,
                content=None if body is None else orjson.dumps(body),
                headers=self._headers,
                timeout=self._timeout_seconds,
                trust_env=self._uses_proxy,
            )
            found: Any = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            fail(f"{self._url} did not answer as a node does ({error or type(error).__name__}): start it or give --url")
        if reply.status_code >= 400 or not isinstance(found, dict):
            reason = found.get("error") if isinstance(found, dict) else None
            fail(str(reason.get("message") if isinstance(reason, dict) else found)[:2000])
        return dict(found)
