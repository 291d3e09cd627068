"""A node started for as long as something needs it."""

import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from appliance.cli.output import fail, stderr

_URL: Final = re.compile(r"Ready after .* at (https?://\S+)")
_READY_SECONDS: Final = 900.0
"""A first start measures variants, and a large model loads for minutes."""
_STOP_SECONDS: Final = 30.0
_TAIL_BYTES: Final = 2_000


@contextmanager
def started_node(model: str | None, config_path: Path | None, data_dir: Path | None) -> Iterator[str]:
    """`appliance serve` on a free port; gives its address when it can answer, and ends it afterwards."""
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0"]
    command += ["--model", model] if model is not None else []
    command += ["--config", str(config_path)] if config_path is not None else []
    command += ["--data-dir", str(data_dir)] if data_dir is not None else []
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            with stderr.status(f"starting a node{f' with {model}' if model else ''}"):
                url = _wait(process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: "subprocess.Popen[str]", log: IO[bytes]) -> str:
    assert process.stdout is not None
    ends = time.monotonic() + _READY_SECONDS
    while (left := ends - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        line = process.stdout.readline()
        if not line:
            process.wait()
            log.seek(0)
            said = log.read()[-_TAIL_BYTES:].decode(errors="replace").strip()
            fail(f"the node ended before it was ready: {said or 'it said nothing'}")
        found = _URL.search(line)
        if found is not None:
            return found[1]
    fail(f"the node was not ready after {_READY_SECONDS:.0f} s")
