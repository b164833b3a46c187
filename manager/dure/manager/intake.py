"""Group commit of what agents report: many statuses, one transaction, every few milliseconds."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from dure.fleet.v1 import fleet_pb2
from dure.manager import schema
from dure.manager.model import KernelHealth, KernelPhase
from dure.manager.pulls import Pulls
from dure.manager.store import Store, rows_by_uid
from dure.wire.backoff import backoff_s

log = logging.getLogger(__name__)

# Long enough for the reports of one moment to meet, short beside every probe interval.
GATHER_S = 0.002
BATCH_MAX = 2_000
PENDING_MAX = 200_000

_PHASES = {
    fleet_pb2.KERNEL_PHASE_PREPARING: KernelPhase.PREPARING,
    fleet_pb2.KERNEL_PHASE_RUNNING: KernelPhase.RUNNING,
    fleet_pb2.KERNEL_PHASE_STOPPING: KernelPhase.STOPPING,
    fleet_pb2.KERNEL_PHASE_EXITED: KernelPhase.EXITED,
    fleet_pb2.KERNEL_PHASE_GONE: KernelPhase.GONE,
}
_HEALTH = {
    fleet_pb2.KERNEL_HEALTH_DEGRADED: KernelHealth.DEGRADED,
    fleet_pb2.KERNEL_HEALTH_HEALTHY: KernelHealth.HEALTHY,
    fleet_pb2.KERNEL_HEALTH_UNHEALTHY: KernelHealth.UNHEALTHY,
}


class Intake:
    """Newest status of each kernel, waiting to be stored. A newer one replaces an older one."""

    def __init__(self, store: Store, pulls: Pulls) -> None:
        self._store = store
        self._pulls = pulls
        self._pending: dict[str, tuple[str, fleet_pb2.KernelStatus]] = {}
        self._wake = asyncio.Event()

    def report(self, agent_uid: str, kernels: Sequence[fleet_pb2.KernelStatus]) -> bool:
        """False if there is no room: the agent must be cut off, and will report all when it is back."""
        if len(self._pending) + len(kernels) > PENDING_MAX:
            return False
        for status in kernels:
            self._pending[status.uid] = (agent_uid, status)
        if kernels:
            self._wake.set()
        return True

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            batch = dict(list(self._pending.items())[:BATCH_MAX])
            for uid in batch:
                del self._pending[uid]
            if not self._pending:
                self._wake.clear()
            try:
                await self._store_batch(batch)
                failures = 0
            except Exception:
                failures += 1
                delay_s = backoff_s(failures, first_s=0.1, max_s=5.0, jitter=random.random())
                log.exception("could not store %d reports; again in %.1f s", len(batch), delay_s)
                # Newer reports that came meanwhile win.
                self._pending = {**batch, **self._pending}
                self._wake.set()
                await asyncio.sleep(delay_s)

    async def _store_batch(self, batch: dict[str, tuple[str, fleet_pb2.KernelStatus]]) -> None:
        taken: list[tuple[str, fleet_pb2.KernelStatus]] = []
        async with self._store.write() as tx:
            rows: dict[str, schema.Kernel] = await rows_by_uid(tx.session, schema.Kernel, batch)
            for uid, row in rows.items():
                agent_uid, status = batch[uid]
                phase = _PHASES.get(status.phase)
                # An agent speaks of its own kernels only; what is gone stays gone, what ended has ended.
                if row.agent_uid != agent_uid or phase is None or row.phase == KernelPhase.GONE:
                    continue
                if row.phase == KernelPhase.EXITED and phase is not KernelPhase.GONE:
                    continue
                taken.append((row.endpoint_uid, status))
                stored = _stored(status)
                if phase is KernelPhase.GONE:
                    # How it ended is worth keeping; the last word of an agent has nothing else to say.
                    stored = row.status if row.status and not status.HasField("exit") else stored
                    tx.touch("agent", agent_uid)
                elif stored == row.status:
                    continue
                row.phase = phase.value
                row.health = _HEALTH.get(status.health, KernelHealth.UNKNOWN).value
                row.status = stored
                tx.touch("endpoint", row.endpoint_uid)
        moved = {uid for uid, status in taken if self._pulls.take(status)}
        # Nothing to decide, so the controller sleeps on; who watches wants to see it.
        if moved:
            self._store.tell([("progress", uid) for uid in sorted(moved)])


def _stored(status: fleet_pb2.KernelStatus) -> bytes:
    """What is kept of a report: all but how far an image is, see `pulls`."""
    if status.HasField("pull"):
        kept = fleet_pb2.KernelStatus()
        kept.CopyFrom(status)
        kept.ClearField("pull")
        status = kept
    return status.SerializeToString(deterministic=True)
