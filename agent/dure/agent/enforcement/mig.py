"""MIG: the GPU itself keeps its parts apart, memory, processors and faults alike. Nothing is left to do but
to see that a kernel uses the part that it was given, and no other device."""

from __future__ import annotations

from dure.agent.backends.base import Ended, Injection
from dure.agent.enforcement import Held, Seen
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import MIG


class Mig:
    """See `enforcement.Enforcer`."""

    name = MIG
    by_use = False

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        return "" if device.parent else "it is no part of a GPU in MIG mode"

    async def inject(self, kernel: Held) -> Injection:
        return Injection()

    def verify(self, kernel: Held, seen: Seen) -> str:
        own = {part.device for part in kernel.parts if part.parent}
        if len(own) < len(kernel.parts):
            return "not all of its devices are parts of a GPU in MIG mode"
        others = sorted(device for device, used in seen.memory_bytes.items() if used and device not in own)
        return f"it uses {', '.join(others)}, which it was not granted" if others else ""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        return None

    def forget(self, living: frozenset[str]) -> None:
        return None
