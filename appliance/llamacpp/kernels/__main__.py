"""Builds the kernels and prints where the library lies; `--remove` takes it away again.

Exit codes: 0 done, 1 they cannot be built here (the reason and the remedy are one line on stderr), 2 bad arguments.
"""

import argparse
import sys
from collections.abc import Sequence

from appliance.llamacpp.kernels.library import COMMAND, KernelsUnavailable, build_library, remove_library


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Build the CPU engine's own kernels.")
    parser.add_argument("--remove", action="store_true", help="take them away: llama.cpp then computes alone")
    options = parser.parse_args(argv)
    try:
        paths = remove_library() if options.remove else (build_library(),)
    except KernelsUnavailable as error:
        remedy = f"; what to do: {error.remedy}" if error.remedy else ""
        sys.stderr.write(f"kernels: {error.message}{remedy}\n")
        return 1
    for path in paths:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
