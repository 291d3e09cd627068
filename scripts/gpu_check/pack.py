"""Puts the node's packages into a folder, for a machine without a network. Needs nothing but Python and its pip.

    pack.py FOLDER [--python 3.12]

vLLM and a model have to be carried apart: they are hundreds of megabytes.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

_PINS: Final = Path(__file__).resolve().parents[1] / "requirements" / "default.txt"
_NOT_NEEDED: Final = frozenset({"onnxruntime", "scikit-learn", "scipy", "joblib", "threadpoolctl", "phonenumbers"})
"""Large ones that the router does without: encoders in processes of their own, and searching for telephone numbers."""
_NEWEST_GLIBC: Final = 39


def platforms() -> list[str]:
    """Every manylinux that such a machine takes: pip matches them exactly."""
    names = [f"manylinux_2_{minor}_x86_64" for minor in range(_NEWEST_GLIBC, 4, -1)]
    return [*names, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any"]


def wanted(text: str, python: str) -> list[str]:
    """The pinned requirements without their hashes, those left out that are for another Python or not needed."""
    found = []
    for line in text.splitlines():
        match = re.match(r"(?P<name>[a-z0-9][\w.-]*)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>[^\\]+))?", line)
        if match is None or match["name"] in _NOT_NEEDED:
            continue
        marker = match["marker"] or ""
        if ("win32" in marker and "!=" not in marker) or not _is_for(marker, python):
            continue
        found.append(f"{match['name']}=={match['version']}")
    return found


def _is_for(marker: str, python: str) -> bool:
    """Whether a marker's bound on Python's version holds. Other markers are taken to hold."""
    number = tuple(map(int, python.split(".")))
    for sign, bound in re.findall(r"python_(?:full_)?version (<|>=|<=|>|==) '([\d.]+)'", marker):
        other = tuple(map(int, bound.split(".")[:2]))
        holds = {"<": number < other, "<=": number <= other, ">": number > other, ">=": number >= other}
        if not holds.get(sign, number == other):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    asked = parser.parse_args()
    tags = [word for name in platforms() for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", asked.python, "--implementation", "cp", *tags, "--dest", str(asked.folder)]
    for abi in ("cp" + asked.python.replace(".", ""), "abi3", "none"):
        command += ["--abi", abi]
    done = subprocess.run([*command, *wanted(_PINS.read_text("utf-8"), asked.python)], check=False)
    if done.returncode:
        return done.returncode
    wheels = sorted(asked.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB in {asked.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
