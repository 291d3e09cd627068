"""What a class of device is likely to be and do, until the very machine has been read and measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.catalog.sources import STRICT, Name, Positive


@dataclass(frozen=True, slots=True)
class DevicePrior:
    """What a class of device is likely to do, until this very machine has been measured."""

    __pydantic_config__ = STRICT

    name: Name
    title: str
    kind: Literal["cpu", "gpu"]
    basis: Literal["measured", "vendor", "assumed"]
    source: str
    """Where the figures come from."""
    memory_bandwidth_bytes_per_second: Positive
    """Of the whole device. Decoding one sequence reads all weights once a token, so this bounds it."""
    flags: tuple[str, ...] = ()
    """CPU: instruction sets that must all be there, as the kernel names them."""
    product_names: tuple[str, ...] = ()
    """GPU: any of these, as whole words, within the name that NVML reports."""
    memory_bytes: Positive | None = None
    """GPU: as NVML reports it in total, or what of the machine's RAM the system shows where the memory is shared. CPU:
    of a machine that one is likely to meet, to plan for one that is not at hand."""
    compute_capability: str | None = None
    prefill_operations_per_second: Mapping[str, Positive] | None = None
    """By quantisation: useful operations (2 x parameters x tokens) in a second. CPU: of one core. GPU: of the board."""
    cores: Positive | None = None
    """Physical cores of a machine that one is likely to meet, to plan for one that is not at hand."""
    unified_memory: bool = False
    """GPU: it shares the machine's RAM."""
    power_watts: Positive | None = None
    """GPU: the board's limit as delivered."""
    peak_operations_per_second: Mapping[str, Positive] | None = None
    """GPU: by precision, dense, as the vendor states them; what is reached is less."""
    nvlink_bytes_per_second: Positive | None = None
    """GPU: to all its peers together, both ways."""
