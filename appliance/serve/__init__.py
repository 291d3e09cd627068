"""The composition root: every room is built here, started in order, and stopped in the opposite order."""

from appliance.serve.http_server import check_free
from appliance.serve.run import RunningNode, serve
from appliance.serve.startup_config import NodeSpec, ledger_url, prepare

__all__ = ["NodeSpec", "RunningNode", "check_free", "ledger_url", "prepare", "serve"]
