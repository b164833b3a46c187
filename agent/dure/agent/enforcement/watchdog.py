"""The watchdog: a kernel that holds more of a device's memory than its share, at two looks in a row, must go.

Its neighbours stay. It comes after the fact: a neighbour may have found no memory meanwhile, and computing
time is not looked at. Each program on a GPU costs its driver some hundred MiB (its context, its kernels) that
count as the program's; a program told to stay within its share overdraws by that. So an allowance per device
is on top of the share. It is none for a device that was not granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.agent.backends.base import Ended, Injection
from dure.agent.enforcement import MIB, MILLI, Held, Part, Seen
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import WATCHDOG
from dure.wire.quantities import human_bytes

REASON = "GPU_MEMORY_EXCEEDED"
LOOKS = 2
ALLOWANCE_MIB = 512


@dataclass(frozen=True)
class Excess:
    """More of a device than was granted, or of one that was not (`share_milli` 0)."""

    device: str
    used_bytes: int
    share_bytes: int
    share_milli: int


def excesses(
    parts: tuple[Part, ...], used_bytes: Mapping[str, Mapping[int, int]], allowance_bytes: int
) -> list[Excess]:
    """By device; `used_bytes` has the bytes of the kernel's own processes by device and pid."""
    granted = {part.device: part for part in parts}
    found = []
    for device, by_pid in sorted(used_bytes.items()):
        part = granted.get(device)
        used = sum(by_pid.values())
        if used > (part.memory_bytes + allowance_bytes if part else 0):
            found.append(
                Excess(device, used, part.memory_bytes if part else 0, part.share_milli if part else 0)
            )
    return found


def strikes(
    before: Mapping[str, int], found: list[Excess], used_bytes: Mapping[str, Mapping[int, int]]
) -> dict[str, int]:
    """Looks in a row with an excess, by device. A device that tells nothing now keeps its count: a driver
    that hangs for a moment absolves nobody, and accuses nobody."""
    kept = {device: count for device, count in before.items() if device not in used_bytes}
    return kept | {excess.device: before.get(excess.device, 0) + 1 for excess in found}


class Watchdog:
    """See `enforcement.Enforcer`."""

    name = WATCHDOG
    by_use = False

    def __init__(self, allowance_mib: int = ALLOWANCE_MIB) -> None:
        self._allowance_bytes = allowance_mib * MIB
        # By kernel.
        self._strikes: dict[str, dict[str, int]] = {}

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        if device.accelerator != "cuda":
            return "nothing tells what is used of it"
        return "" if told else "the driver does not tell who holds its memory"

    async def inject(self, kernel: Held) -> Injection:
        return Injection()

    def verify(self, kernel: Held, seen: Seen) -> str:
        silent = sorted({part.device for part in kernel.parts} - seen.memory_bytes.keys())
        return f"the driver does not tell who holds the memory of {', '.join(silent)}" if silent else ""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        found = excesses(kernel.parts, seen.memory_bytes, self._allowance_bytes)
        counts = strikes(self._strikes.get(kernel.uid, {}), found, seen.memory_bytes)
        self._strikes[kernel.uid] = counts
        worst = next((excess for excess in found if counts[excess.device] >= LOOKS), None)
        return None if worst is None else Ended(REASON, -1, _sentence(worst))

    def forget(self, living: frozenset[str]) -> None:
        self._strikes = {uid: counts for uid, counts in self._strikes.items() if uid in living and counts}


def _sentence(excess: Excess) -> str:
    used = human_bytes(excess.used_bytes)
    if not excess.share_milli:
        return f"it held {used} of the memory of {excess.device}, which it was not granted, and was stopped"
    share = f"{excess.share_milli / MILLI:g}"
    return (
        f"it held {used} of the memory of {excess.device}, of which its share of {share} is "
        f"{human_bytes(excess.share_bytes)}, and was stopped; ask for more cuda.shares, or have the "
        "program take less (vLLM: --gpu-memory-utilization)"
    )
