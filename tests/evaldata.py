"""Where the open evaluation data lies. It is no part of the repository, so tests that need it may have to skip."""

import os
from pathlib import Path

import pytest

# read on import: the guard of every test takes the appliance's settings out of the environment
_GIVEN = os.environ.get("APPLIANCE_EVAL_DATA")


def evaluation_data(part: str = "") -> Path:
    """Its folder, or `part` of it. Skips the test where it is not there."""
    folder = Path(_GIVEN) if _GIVEN else Path(__file__).resolve().parents[2] / "shared" / "data"
    wanted = folder / part if part else folder
    if not wanted.exists():
        pytest.skip(f"no evaluation data at {wanted}: name its folder with APPLIANCE_EVAL_DATA")
    return wanted
