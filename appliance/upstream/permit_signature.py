"""The seal of an egress permit: a digest that only holders of this process's key can make."""

import hmac
from typing import Final

import orjson

from appliance.core import Target

_BATCH: Final = "\x00batch "
"""No request's id begins so: it comes in a header, or is made here."""


def sign_permit(key: bytes, request_id: str, target: Target) -> bytes:
    """Bind a request to one concrete endpoint: name, address and region, so that none can be changed afterwards."""
    parts = (request_id, target.name, target.address, target.region or "")
    message = b"".join(len(part := text.encode("utf-8", "surrogatepass")).to_bytes(4, "big") + part for text in parts)
    return hmac.digest(key, message, "sha256")


def is_signed(key: bytes, request_id: str, target: Target, given: bytes) -> bool:
    return hmac.compare_digest(sign_permit(key, request_id, target), given)


def batch_id(name: str) -> str:
    """What stands in place of a request's id in a permit for the affairs of a batch whose lines had theirs."""
    return _BATCH + name


def is_for_batch(request_id: str) -> bool:
    return request_id.startswith(_BATCH)


def line_start(request_id: str) -> bytes:
    """How the line of a provider's batch begins that carries this request."""
    return b'{"custom_id":' + orjson.dumps(request_id)
