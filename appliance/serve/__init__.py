"""The composition root: every room is built here, started in order, and stopped in the opposite order."""

from appliance.serve.http_server import check_free
from appliance.serve.run import Running, serve
from appliance.serve.startup_config import Site, ledger_url, prepare

__all__ = ["Running", "Site", "check_free", "ledger_url", "prepare", "serve"]
