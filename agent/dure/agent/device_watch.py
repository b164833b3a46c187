"""Looks at the node's accelerators as long as the agent runs, and keeps what is known of their devices."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from dure.agent import device_changes
from dure.agent.accelerators import Accelerator, Found, Request
from dure.agent.backends.base import Ended, Handle
from dure.agent.shim.files import write_bytes
from dure.fleet.v1 import fleet_pb2
from dure.wire.backoff import backoff_s

INTERVAL_S = 2.0
# What the agent waits at its start for a first look. A driver that takes longer does not keep it from the
# manager: its devices come later.
FIRST_LIMIT_S = 3.0
# Plug-ins keep limits of their own; this is for one that does not.
ROUND_LIMIT_S = 60.0
_log = logging.getLogger(__name__)


class Kernels(Protocol):
    """What the watch needs of the supervisor."""

    def held(self) -> frozenset[str]:
        """Ids of the devices that kernels of this agent have."""

    def running(self) -> Sequence[tuple[fleet_pb2.KernelSpec, Handle]]:
        """Kernels whose command runs."""

    def condemn(self, uid: str, ended: Ended) -> None:
        """Begins to end a kernel; called again as long as it runs."""


class DeviceWatch:
    """`devices` is what it keeps, for others to read: they see changes in it at once. `wake` is called when
    there is something to take. `on_round` is told each round's findings after the devices were updated; what
    it changes of them, and the limitations that it answers, are told to the manager too.

    `file` holds the devices for the next agent; `held` are those that kernels have of an agent before.
    `limitations` are the node's others, `withheld` those by accelerator."""

    def __init__(
        self,
        plugins: Sequence[Accelerator],
        request: Request,
        devices: dict[str, fleet_pb2.Device],
        kernels: Kernels,
        wake: Callable[[], None],
        *,
        file: Path,
        held: frozenset[str] = frozenset(),
        limitations: Sequence[str] = (),
        withheld: Mapping[str, str] | None = None,
        on_round: Callable[[Found], Awaitable[Sequence[str]]] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._plugins = plugins
        self._devices = devices
        self._kernels = kernels
        self._wake = wake
        self._file = file
        self._held = held
        self._withheld = withheld or {}
        self._on_round = on_round
        self._interval_s = interval_s
        self._looked = asyncio.Event()
        self._newest: list[fleet_pb2.Device] = []
        self._written = self._newest
        self._unsent = False
        devices.update(device_changes.remembered(_read(file), held))
        self._request = replace(request, known=tuple(devices.values()))
        self._node_limitations = tuple(limitations)
        # Those of the last round.
        self._limitations: tuple[str, ...] = ()

    async def first(self, limit_s: float = FIRST_LIMIT_S) -> None:
        """Waits for the first round, but not longer than that."""
        try:
            async with asyncio.timeout(limit_s):
                await self._looked.wait()
        except TimeoutError:
            _log.warning("the accelerators of this node take their time; going on without them")

    def begin_stream(self) -> list[fleet_pb2.Device]:
        """The devices for a Hello; what waited to be told is part of it."""
        self._unsent = False
        return _copies(self._devices)

    def take(self) -> fleet_pb2.DevicesChanged | None:
        """What the manager must be told, once."""
        if not self._unsent:
            return None
        return fleet_pb2.DevicesChanged(devices=self.begin_stream(), limitations=self.limitations)

    @property
    def limitations(self) -> tuple[str, ...]:
        """All that the node lacks, for people."""
        there = {device.accelerator for device in self._devices.values()}
        withheld = (why for name, why in self._withheld.items() if name in there)
        return (*self._node_limitations, *withheld, *self._limitations)

    async def run(self) -> None:
        """Until cancelled."""
        attempt = 0
        while True:
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(ROUND_LIMIT_S):
                    await self._round()
                attempt = 0
            except Exception:
                # The top of the loop: kernels run on, and the devices are looked at again.
                attempt += 1
                _log.exception("looking at the accelerators broke; trying again")
                await asyncio.sleep(backoff_s(attempt, first_s=1.0, max_s=30.0, jitter=0.0))
            self._looked.set()
            await asyncio.sleep(max(0.0, began_s + self._interval_s - time.monotonic()))

    async def _round(self) -> None:
        found = await self._find()
        after = device_changes.changes(
            self._devices, found, self._held | self._kernels.held(), self._withheld
        )
        self._devices.clear()
        self._devices.update(after.devices)
        for sentence in after.troubles:
            _log.warning("%s", sentence)
        for sentence in after.recoveries:
            _log.info("%s", sentence)
        if after.lost:
            # First: who places anew the kernels that end now must not choose the same devices.
            self._tell_changes()
        running = (spec for spec, _ in self._kernels.running())
        for uid, ended in device_changes.doomed(running, after.lost).items():
            self._kernels.condemn(uid, ended)
        more = await self._on_round(found) if self._on_round is not None else ()
        spoken, self._limitations = self._limitations, (*found.limitations, *more)
        for sentence in self._limitations:
            if sentence not in spoken:
                _log.warning("%s", sentence)
        self._tell_changes(more=spoken != self._limitations)
        if self._newest is not self._written:
            self._written = self._newest
            await asyncio.to_thread(_write, self._file, self._newest)

    def _tell_changes(self, more: bool = False) -> None:
        newest = _copies(self._devices)
        if newest != self._newest or more:
            self._newest, self._unsent = newest, True
            self._wake()

    async def _find(self) -> Found:
        """What all plug-ins found; each is told what those before it did."""
        all_found = Found()
        for plugin in self._plugins:
            one = await plugin.find(replace(self._request, found=all_found.devices))
            all_found = Found(
                all_found.devices + one.devices,
                all_found.limitations + one.limitations,
                all_found.lost | one.lost,
                {**all_found.memory, **one.memory},
                {**all_found.mps, **one.mps},
            )
        return all_found


def _copies(devices: Mapping[str, fleet_pb2.Device]) -> list[fleet_pb2.Device]:
    # Whoever looks at a round may write into a device.
    return list(fleet_pb2.DevicesChanged(devices=devices.values()).devices)


def _read(file: Path) -> list[fleet_pb2.Device]:
    try:
        return list(fleet_pb2.DevicesChanged.FromString(file.read_bytes()).devices)
    except (FileNotFoundError, DecodeError):
        return []


def _write(file: Path, devices: Sequence[fleet_pb2.Device]) -> None:
    write_bytes(str(file), fleet_pb2.DevicesChanged(devices=devices).SerializeToString())
