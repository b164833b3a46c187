"""The watchdog: a kernel that holds more of a device's memory than its share, at two looks in a row, must go.

Its neighbours stay. It comes after the fact: a neighbour may have found no memory meanwhile, and computing
time is not looked at. What a driver needs for each program (its context, some hundred MiB) is not the
kernel's doing and is allowed on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.agent.backends.base import Ended
from dure.agent.enforcement import MILLI, WATCHDOG, Held, Part, Seen
from dure.fleet.v1 import fleet_pb2
from dure.wire.quantities import human_bytes

REASON = "GPU_MEMORY_EXCEEDED"
LOOKS = 2
CONTEXT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Excess:
    """More of a device than was granted, or of one that was not (`share_milli` 0)."""

    device: str
    used_bytes: int
    allowed_bytes: int
    share_milli: int


def excesses(parts: tuple[Part, ...], used_bytes: Mapping[str, Mapping[int, int]]) -> list[Excess]:
    """By device; `used_bytes` has the bytes of the kernel's own processes by device and pid."""
    granted = {part.device: part for part in parts}
    found = []
    for device, by_pid in sorted(used_bytes.items()):
        part = granted.get(device)
        used, allowed = sum(by_pid.values()), part.memory_bytes if part else 0
        if used > allowed + CONTEXT_BYTES:
            found.append(Excess(device, used, allowed, part.share_milli if part else 0))
    return found


class Watchdog:
    """See `enforcement.Enforcer`."""

    name = WATCHDOG

    def __init__(self) -> None:
        # Looks in a row at which a kernel held too much.
        self._strikes: dict[str, int] = {}

    async def probe(self, device: fleet_pb2.Device) -> str:
        return "" if device.accelerator == "cuda" else "nothing tells what is used of it"

    async def inject(self, kernel: Held) -> Mapping[str, str]:
        return {}

    def verify(self, kernel: Held, seen: Seen) -> str:
        silent = sorted({part.device for part in kernel.parts} - seen.memory_bytes.keys())
        return f"the driver does not tell who holds the memory of {', '.join(silent)}" if silent else ""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        found = excesses(kernel.parts, seen.memory_bytes)
        if not found:
            self._strikes.pop(kernel.uid, None)
            return None
        self._strikes[kernel.uid] = self._strikes.get(kernel.uid, 0) + 1
        if self._strikes[kernel.uid] < LOOKS:
            return None
        return Ended(REASON, -1, _sentence(found[0]))

    def forget(self, living: frozenset[str]) -> None:
        self._strikes = {uid: count for uid, count in self._strikes.items() if uid in living}


def _sentence(excess: Excess) -> str:
    used = human_bytes(excess.used_bytes)
    if not excess.share_milli:
        return f"it held {used} of the memory of {excess.device}, which it was not granted, and was stopped"
    share = f"{excess.share_milli / MILLI:g}"
    return (
        f"it held {used} of the memory of {excess.device}, of which its share of {share} is "
        f"{human_bytes(excess.allowed_bytes)}, and was stopped; ask for more cuda.shares, or have the "
        "program take less (vLLM: --gpu-memory-utilization)"
    )
