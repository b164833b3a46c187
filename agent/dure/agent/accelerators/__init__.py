"""Accelerator plug-ins: entry points of the group `dure.agent.accelerators` name classes of this contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dure.agent.usage import DeviceUse
from dure.fleet.v1 import fleet_pb2

SHARES_PER_DEVICE_MILLI = 1000


@dataclass(frozen=True)
class Found:
    """What a plug-in found. `limitations` are sentences for people: a driver that does not answer, say.

    A device that was found once stays among `devices`, unhealthy when it is not there. Of those, `lost` are
    the ones whose sessions cannot go on. `memory` has the bytes that host processes hold, by pid, of each
    device that tells; `mps` which of these processes share it through NVIDIA's MPS.
    """

    devices: tuple[fleet_pb2.Device, ...] = ()
    limitations: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()
    memory: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    mps: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What the agent tells its plug-ins. `found` is what those before found. `known` are devices that kernels
    have of an agent before this one: of its own among them, a plug-in keeps those that it does not find."""

    agent: str
    simulated_gpus: int
    found: Sequence[fleet_pb2.Device] = ()
    known: Sequence[fleet_pb2.Device] = ()


class Accelerator(Protocol):
    """Finds the devices of one kind."""

    name: str
    # Plug-ins are asked in this order.
    order: int

    async def find(self, request: Request) -> Found:
        """Asked at the start, and every few seconds from then on. Never raises for what a driver does, and
        never waits for it without a limit."""

    def measure(self) -> Mapping[str, DeviceUse]:
        """What processes use of its devices now, by the device's id; one that cannot be told is left out.
        Blocks, as long as the driver does, and is called from a thread of its own; never raises for what a
        driver does."""


def device(id: str, model: str, memory_bytes: int, accelerator: str) -> fleet_pb2.Device:
    """A healthy device that offers itself in shares or as a whole."""
    return fleet_pb2.Device(
        id=id,
        model=model,
        memory_bytes=memory_bytes,
        accelerator=accelerator,
        slots={"cuda.shares": SHARES_PER_DEVICE_MILLI, "cuda.device": SHARES_PER_DEVICE_MILLI},
        healthy=True,
    )
