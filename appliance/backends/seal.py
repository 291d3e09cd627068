"""The seal of an egress permit: a digest that only holders of this process's key can make."""

import hmac

from appliance.core import Target


def seal(key: bytes, request_id: str, target: Target) -> bytes:
    """Bind a request to one concrete endpoint: name, address and region, so that none can be changed afterwards."""
    parts = (request_id, target.name, target.address, target.region or "")
    message = b"".join(len(part := text.encode("utf-8", "surrogatepass")).to_bytes(4, "big") + part for text in parts)
    return hmac.digest(key, message, "sha256")


def is_sealed(key: bytes, request_id: str, target: Target, given: bytes) -> bool:
    return hmac.compare_digest(seal(key, request_id, target), given)
