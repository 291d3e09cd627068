"""What the table of dialects must say of every row."""

from typing import get_args

from appliance.core import Dialect
from appliance.tasks.chat import CHAT_ENDPOINTS
from appliance.wire.registry import DIALECTS, INBOUND


def test_every_dialect_that_a_target_can_have_is_in_the_table() -> None:
    assert set(get_args(Dialect)) <= set(DIALECTS)


def test_every_chat_endpoint_but_openais_own_is_a_dialects() -> None:
    assert {"chat", *INBOUND} == CHAT_ENDPOINTS
