"""What the worker processes (`appliance.llamacpp`, `appliance.encoders`) share: socket, server, log, limits, end.

It imports `appliance.errors` alone, so that a worker loads nothing of the router.
"""

from typing import Final

EXIT_CLEAN: Final = 0
EXIT_ARGUMENTS: Final = 2
"""Bad arguments. Another start cannot mend it."""
EXIT_MODEL_FILE: Final = 3
"""The model file is missing or corrupt. Another start cannot mend it."""
EXIT_ENGINE: Final = 4
"""The engine failed. Another start may succeed."""
