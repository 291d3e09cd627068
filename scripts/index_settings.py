"""pip's settings, from its environment variables and pip.conf, as the environment variables that uv reads.

Prints shell assignments. What the operator has set for uv itself is left alone. uv does not read pip's settings, and
whoever has an index of their own has told pip.
"""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def _words(value: str) -> str:
    return " ".join(value.split())


def _spaced(value: str) -> str:
    return " ".join(filter(_may_exist, value.split()))


def _commas(value: str) -> str:
    return ",".join(filter(_may_exist, value.split()))


def _may_exist(place: str) -> bool:
    """pip passes over a local folder that is not there; uv would stop."""
    scheme, separator, rest = place.partition("://")
    if separator and scheme != "file":
        return True
    return Path(rest if separator else place).exists()


UV_NAMES: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "index-url": ("UV_DEFAULT_INDEX", str.strip),
    "extra-index-url": ("UV_INDEX", _spaced),
    "find-links": ("UV_FIND_LINKS", _commas),
    "trusted-host": ("UV_INSECURE_HOST", _words),
    "cert": ("SSL_CERT_FILE", str.strip),
    "proxy": ("ALL_PROXY", str.strip),
    "default-timeout": ("UV_HTTP_TIMEOUT", str.strip),
    "timeout": ("UV_HTTP_TIMEOUT", str.strip),
}
OLDER_NAMES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
SECTIONS = ("global", "install", ":env:")
"""Those that hold for an installation, the strongest last."""


def uv_settings(pip_config: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What to set for uv, given the output of `pip config list`."""
    told: dict[str, str] = {}
    for section in SECTIONS:
        for line in pip_config.splitlines():
            name, equals, value = line.partition("=")
            if equals and name.startswith(f"{section}."):
                told[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    found = {variable: change(told[name]) for name, (variable, change) in UV_NAMES.items() if name in told}
    kept = {
        variable: value
        for variable, value in found.items()
        if value and variable not in environment and OLDER_NAMES.get(variable, variable) not in environment
    }
    if "UV_INDEX" in kept and "UV_INDEX_STRATEGY" not in environment:
        # pip looks at all indexes alike; with every hash pinned nobody can slip another package in that way.
        kept["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return kept


def main() -> None:
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    for name, value in uv_settings(asked.stdout, os.environ).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
