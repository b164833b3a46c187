"""Measures the kernels that run, every interval, and keeps the newest round for the link to send."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dure.agent import usage
from dure.agent.accelerators import Accelerator
from dure.agent.backends.base import Backend, Handle
from dure.agent.counts import Counts
from dure.agent.usage import DeviceUse, Grant, Usage
from dure.agent.waiting import Background
from dure.fleet.v1 import fleet_pb2
from dure.wire import quantities
from dure.wire.backoff import backoff_s

INTERVAL_MS, INTERVAL_MS_MIN = 5_000, 500
# A round that takes longer than this is given up: a driver, or a file system of the kernel, hangs.
ROUND_LIMIT_S = 4.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A kernel and its newest values, by the names of `KernelMeasurement`."""

    spec: fleet_pb2.KernelSpec
    values: Mapping[str, float]


class Measurer:
    """`kernels` are those to measure; `wake` is called when there is a new round to take."""

    def __init__(
        self,
        backend: Backend,
        accelerators: Sequence[Accelerator],
        devices: Mapping[str, fleet_pb2.Device],
        kernels: Callable[[], Iterable[tuple[fleet_pb2.KernelSpec, Handle]]],
        wake: Callable[[], None],
        counts: Counts,
    ) -> None:
        self._backend = backend
        self._accelerators = {plugin.name: (plugin, Background(plugin.name)) for plugin in accelerators}
        self._devices = devices
        self._kernels = kernels
        self._wake = wake
        self._counts = counts
        self._looking = Background("measure")
        self._interval_s = INTERVAL_MS / 1000
        self._changed = asyncio.Event()
        self._before: dict[str, Usage] = {}
        self._unsent: list[fleet_pb2.KernelMeasurement] = []
        self._told = ""
        self.newest: dict[str, Measured] = {}

    def set_interval(self, interval_ms: int) -> None:
        """From now on; the next round comes within the new interval."""
        interval_s = max(interval_ms, INTERVAL_MS_MIN) / 1000
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            self._changed.set()

    def begin_stream(self) -> None:
        """What was measured for a stream that broke is old news; the manager says anew how often to look."""
        self._unsent = []
        self.set_interval(INTERVAL_MS)

    def take(self) -> list[fleet_pb2.KernelMeasurement]:
        """The newest round, once. A round that nobody took is replaced by the next."""
        taken, self._unsent = self._unsent, []
        return taken

    async def run(self) -> None:
        """Until cancelled."""
        attempt = 0
        due_s = time.monotonic()
        while True:
            await self._wait_until(due_s)
            began_s = time.monotonic()
            try:
                await self._round()
                attempt = 0
            except TimeoutError:
                self._tell(
                    f"measuring the kernels took longer than {ROUND_LIMIT_S:g} s; this round is left out"
                )
            except Exception:
                # The top of the loop: kernels must run on unmeasured, and be measured again.
                attempt += 1
                _log.exception("measuring broke; trying again")
                await asyncio.sleep(backoff_s(attempt, first_s=1.0, max_s=30.0, jitter=0.0))
            # On the grid of the interval, unless a round outlasted it.
            due_s = max(began_s + self._interval_s, time.monotonic())

    async def _wait_until(self, due_s: float) -> None:
        while (left_s := due_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                return
            self._changed.clear()
            due_s = min(due_s, time.monotonic() + self._interval_s)

    async def _round(self) -> None:
        kernels = list(self._kernels())
        began_s = time.monotonic()
        uses = await self._look_at_devices(kernels)
        handles = [handle for _, handle in kernels]
        pids = {
            spec.uid: await self._backend.processes(handle) for spec, handle in kernels if _grants(spec, uses)
        }
        looks = (
            await self._looking.run(
                lambda: [self._backend.measure(handle) for handle in handles], ROUND_LIMIT_S
            )
            if handles
            else []
        )
        newest: dict[str, Measured] = {}
        seen: dict[str, Usage] = {}
        for (spec, _), now in zip(kernels, looks, strict=True):
            if now is None:
                continue
            seen[spec.uid] = now
            found = usage.values(
                self._before.get(spec.uid),
                now,
                spec.slots.get(quantities.CPU, 0),
                spec.slots.get(quantities.MEM, 0) // quantities.MILLI,
            )
            if spec.uid in pids:
                found |= usage.device_values(self._shares(spec), uses, pids[spec.uid])
            newest[spec.uid] = Measured(spec, found)
        self._before, self.newest = seen, newest
        self._unsent = [
            fleet_pb2.KernelMeasurement(uid=uid, values=measured.values)
            for uid, measured in newest.items()
            if measured.values
        ]
        if kernels:
            self._counts.measured.observe(time.monotonic() - began_s)
        if self._unsent:
            self._wake()

    async def _look_at_devices(
        self, kernels: Iterable[tuple[fleet_pb2.KernelSpec, Handle]]
    ) -> dict[str, DeviceUse]:
        granted = {grant.device for spec, _ in kernels for grant in spec.devices}
        names = {self._devices[device].accelerator for device in granted if device in self._devices}
        uses: dict[str, DeviceUse] = {}
        for name in sorted(names & self._accelerators.keys()):
            plugin, background = self._accelerators[name]
            try:
                uses.update(await background.run(plugin.measure, ROUND_LIMIT_S))
            except TimeoutError:
                self._tell(f"accelerator `{name}` does not tell what is used of it: it does not answer")
        return uses

    def _shares(self, spec: fleet_pb2.KernelSpec) -> list[Grant]:
        granted = [(grant, self._devices.get(grant.device)) for grant in spec.devices]
        return [
            Grant(grant.device, grant.amount, device.memory_bytes, bool(device.parent))
            for grant, device in granted
            if device is not None
        ]

    def _tell(self, message: str) -> None:
        """Once, however often it happens in a row."""
        if message != self._told:
            _log.warning("%s", message)
            self._told = message


def _grants(spec: fleet_pb2.KernelSpec, uses: Mapping[str, DeviceUse]) -> bool:
    return any(grant.device in uses for grant in spec.devices)
