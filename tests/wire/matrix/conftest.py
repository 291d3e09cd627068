"""What all tests of dialects share."""

import functools
import ssl
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_tls_context() -> Iterator[None]:
    """Every client of an SDK reads all certificates of the world, 35 ms each time, and no test uses TLS."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield
