"""What keeps a kernel within its parts of devices: the contract of the modes, and the words they share.

A mode is asked whether it works on this node (`probe`), what a kernel needs for it (`inject`), whether it is
in force for a kernel that runs (`verify`), and whether a kernel must go (`watch`). What is shown is what was
verified: a mode that was prepared and is not found in force is not it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dure.agent.backends.base import Ended
from dure.fleet.v1 import fleet_pb2

MIG, MPS, HOOK, WATCHDOG, NONE = "mig", "mps", "hook", "watchdog", "none"
MILLI = 1000


@dataclass(frozen=True)
class Part:
    """A part of a device: milli-units of it, the memory of the whole, and the GPU that the device is a part
    of, empty if it is one itself. A part of a GPU is always granted as a whole."""

    device: str
    share_milli: int
    device_memory_bytes: int
    parent: str = ""

    @property
    def memory_bytes(self) -> int:
        return (
            self.device_memory_bytes if self.parent else self.device_memory_bytes * self.share_milli // MILLI
        )


@dataclass(frozen=True)
class Held:
    """A kernel as modes see it: what it was granted, and the variables that its user set."""

    uid: str
    parts: tuple[Part, ...]
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What was seen of a kernel: its processes, and the bytes that they hold of each device that tells what
    its processes hold. `sharing` are those of them that use a device through MPS."""

    pids: frozenset[int]
    memory_bytes: Mapping[str, Mapping[int, int]]
    sharing: frozenset[int] = frozenset()

    @property
    def using(self) -> frozenset[int]:
        """Those of its processes that use a device."""
        return frozenset(pid for used in self.memory_bytes.values() for pid in used)


class Enforcer(Protocol):
    """A mode. All but `probe` and `inject` are called from a thread, once a look."""

    name: str

    async def probe(self, device: fleet_pb2.Device) -> str:
        """Empty if it works for this device, else why not. Asked again at every look; cheap but for the first
        time."""

    async def inject(self, kernel: Held) -> Mapping[str, str]:
        """Variables that the kernel must have; they win over its own. Raises backends.base.StartFailed."""

    def verify(self, kernel: Held, seen: Seen) -> str:
        """Empty if it is in force for the kernel now, else a sentence."""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        """How the kernel must end; None for one that stays within its parts."""

    def forget(self, living: frozenset[str]) -> None:
        """Only these kernels are still there."""


def parts(
    grants: Sequence[fleet_pb2.DeviceGrant], devices: Mapping[str, fleet_pb2.Device]
) -> tuple[Part, ...]:
    """Of the devices that are known."""
    return tuple(
        Part(grant.device, grant.amount, devices[grant.device].memory_bytes, devices[grant.device].parent)
        for grant in grants
        if grant.device in devices
    )
