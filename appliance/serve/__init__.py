"""The composition root: builds every part of a node, starts them in order and stops them in the opposite order."""

from appliance.serve.http_server import check_can_start
from appliance.serve.run import RunningNode, serve_node
from appliance.serve.startup_config import NodeSpec, build_node_spec, locate_ledger

__all__ = ["NodeSpec", "RunningNode", "build_node_spec", "check_can_start", "locate_ledger", "serve_node"]
