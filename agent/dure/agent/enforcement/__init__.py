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

from dure.agent.backends.base import Ended, Injection
from dure.fleet.v1 import fleet_pb2

MILLI = 1000
MIB = 2**20


class CannotHold(Exception):
    """A mode cannot be prepared for a kernel now; the next lower one may be. The message is for people."""


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
    """A kernel as modes see it: what it was granted, the variables that its user set, whether it is
    contained, and the Unix user that it runs as, None where only its image tells."""

    uid: str
    parts: tuple[Part, ...]
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    contained: bool = False
    user: int | None = None


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
    """A mode. `verify` of one that is verified `by_use` is called from a thread, once a look, and may read
    what the kernel tells of processes; nothing else of a look waits."""

    name: str
    # Whether it can only be verified in processes that use a device: a kernel without any is not judged.
    by_use: bool

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        """Empty if it works for this device, else why not. `told`: the driver tells who holds its memory.
        Asked again at every look; cheap but for the first time."""

    async def inject(self, kernel: Held) -> Injection:
        """What the kernel must have. Raises CannotHold, or backends.base.StartFailed for a kernel that must
        not run on these devices at all."""

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


def percent(part: Part) -> int:
    """Its computing time, as whole percents, at least one."""
    return max(1, min(100, part.share_milli * 100 // MILLI))


def mebibytes(part: Part) -> int:
    """Its memory. Raises CannotHold for less than one: to those who are told, 0 is no limit."""
    found = part.memory_bytes // MIB
    if found < 1:
        raise CannotHold(f"its part of {part.device} is less than 1 MiB of memory, which cannot be a limit")
    return found
