"""A node started for as long as something needs it."""

import os
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

_URL: Final = re.compile(r"Ready after .* at (https?://\S+)\s")
_READY_SECONDS: Final = 900.0
"""A first start measures variants, and a large model loads for minutes."""
_STOP_SECONDS: Final = 30.0
_TAIL_BYTES: Final = 2_000


@contextmanager
def start_temporary_node(model: str | None, config_path: Path | None, data_dir: Path | None) -> Iterator[str]:
    """`appliance serve` on a free port; gives its address when it can answer, and ends it afterwards."""
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0"]
    command += ["--model", model] if model is not None else []
    command += ["--config", str(config_path)] if config_path is not None else []
    command += ["--data-dir", str(data_dir)] if data_dir is not None else []
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
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


def _wait(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> str:
    assert process.stdout is not None
    handle, said = process.stdout.fileno(), b""
    ends = time.monotonic() + _READY_SECONDS
    while (left := ends - time.monotonic()) > 0:
        # Not by lines: what a reader of lines has taken in already, `select` does not see.
        if not select.select([handle], [], [], left)[0]:
            break
        piece = os.read(handle, _TAIL_BYTES)
        if not piece:
            process.wait()
            log.seek(0)
            last = log.read()[-_TAIL_BYTES:].decode(errors="replace").strip()
            fail(f"the node ended before it was ready: {last or 'it said nothing'}")
        said += piece
        found = _URL.search(said.decode(errors="replace"))
        if found is not None:
            return found[1]
    fail(f"the node was not ready after {_READY_SECONDS:.0f} s")
