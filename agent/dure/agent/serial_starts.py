"""The waiting for `turns`: kernels whose engines measure what is free of a device start one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dure.agent.turns import TURN_MAX_S, Turns, turn_s
from dure.fleet.v1 import fleet_pb2


class SerialStarts:
    """Lives on one event loop. All verbs do nothing for a kernel that may start at any time."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._changed = asyncio.Event()

    async def take(self, spec: fleet_pb2.KernelSpec, tell: Callable[[str], None]) -> None:
        """Waits for its turn; `tell` hears for whom. Cancelled, it gives up its place. It ends, since each
        before it has a bounded turn."""
        if not _is_serial(spec):
            return
        self._enter(spec)
        told = ""
        try:
            while ahead := self._turns.before(spec.uid, time.monotonic()):
                names = ", ".join(f"`{one.name}`" for one in ahead)
                message = f"waiting for {names}, which is starting on the same GPU, to be healthy"
                if message != told:
                    tell(message)
                    told = message
                ends_s = [one.until_s for one in ahead if one.until_s is not None]
                await self._change(min(ends_s, default=None))
        except asyncio.CancelledError:
            self.over(spec.uid)
            raise
        self._turns.begin(spec.uid, time.monotonic() + TURN_MAX_S)
        self._wake()

    def hold(self, spec: fleet_pb2.KernelSpec) -> None:
        """For a kernel that an earlier agent started."""
        if _is_serial(spec):
            self._enter(spec)
            self._turns.begin(spec.uid, time.monotonic() + TURN_MAX_S)

    def began(self, spec: fleet_pb2.KernelSpec, elapsed_s: float) -> None:
        """Its command has been running for so long."""
        self._turns.begin(spec.uid, time.monotonic() + _turn_s(spec) - elapsed_s)
        self._wake()

    def over(self, uid: str) -> None:
        """It is healthy, or gone."""
        if self._turns.leave(uid):
            self._wake()

    def _enter(self, spec: fleet_pb2.KernelSpec) -> None:
        name = spec.session_name or spec.endpoint or spec.uid
        self._turns.enter(spec.uid, spec.session_uid, name, [grant.device for grant in spec.devices])

    def _wake(self) -> None:
        # Each that waits holds on to the event that it saw.
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, until_s: float | None) -> None:
        """Until somebody's turn changed, or is over by the clock."""
        changed = self._changed
        try:
            async with asyncio.timeout(None if until_s is None else max(0.01, until_s - time.monotonic())):
                await changed.wait()
        except TimeoutError:
            return


def _is_serial(spec: fleet_pb2.KernelSpec) -> bool:
    return spec.serial_start and bool(spec.devices)


def _turn_s(spec: fleet_pb2.KernelSpec) -> float:
    if not spec.HasField("health_check"):
        return TURN_MAX_S
    check = spec.health_check
    return turn_s(check.initial_delay_ms / 1000, check.interval_ms / 1000, check.max_retries)
