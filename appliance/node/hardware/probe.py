"""What this machine has, as one frozen value."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.json_types import JsonObject
from appliance.node.hardware.cpu import Cpu, Ram, read_cpu, read_ram
from appliance.node.hardware.nvidia import Gpu, Gpus, load_nvml, read_gpus


@dataclass(frozen=True, slots=True)
class Hardware:
    cpu: Cpu
    ram: Ram
    gpus: Gpus

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that speed depends on; what changes from minute to minute is left out."""
        parts = [
            self.cpu.model,
            self.cpu.architecture,
            self.cpu.usable_cores,
            self.cpu.threads_per_core,
            self.cpu.numa_nodes,
            sorted(self.cpu.flags),
            [(gpu.name, gpu.compute_capability, gpu.memory_total_bytes, gpu.mig_enabled) for gpu in self._own_memory()],
            len(self.gpus.devices),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _own_memory(self) -> list[Gpu]:
        return [gpu for gpu in self.gpus.devices if not gpu.unified_memory]

    def to_dict(self) -> JsonObject:
        """Plain values for JSON."""
        table = dataclasses.asdict(self)
        table["cpu"]["flags"] = sorted(self.cpu.flags)
        return {**table, "fingerprint": self.fingerprint}


def probe_hardware(root: Path = Path("/"), nvml: Any | None = None) -> Hardware:
    """Read the machine. Takes milliseconds without a GPU, up to a second or two while a driver wakes up; call it from a
    thread where an event loop runs. `root` and `nvml` are replaced by recordings in tests."""
    ram = read_ram(root)
    return Hardware(read_cpu(root), ram, read_gpus(ram.total_bytes, ram.usable_bytes, nvml or load_nvml()))
