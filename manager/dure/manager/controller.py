"""The keyed, level-based controller of endpoints: load, decide, apply, publish.

A key is an endpoint's uid. The same key coming twice before it is handled is one run; a run looks at
stored state only, never at what woke it. Whatever a wake-up missed, the periodic resync covers. All of a
run happens in one writing transaction (the store has one writer, so nothing can come between load and
apply); the decisions are pure functions and take microseconds.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import time
from collections.abc import Iterable

from sqlalchemy import select

from dure.manager import routed, schema, views
from dure.manager.addresses import assign_address
from dure.manager.fleet import Fleet
from dure.manager.hub import APPLY_WAIT_MS, Hub
from dure.manager.measures import Measures
from dure.manager.model import (
    EndpointStatus,
    KernelPhase,
    ReplicaView,
)
from dure.manager.plan import Plan
from dure.manager.retention import prune
from dure.manager.round import Round
from dure.manager.serving import in_route
from dure.manager.store import Key, Store, Tx, now_ms
from dure.wire.backoff import backoff_s
from dure.wire.prometheus import Histogram

log = logging.getLogger(__name__)

RESYNC_S = 30.0
TICK_S = 0.25
# A decision may call for another at once (created, then placed, then counted); it settles in two or three.
ROUNDS_MAX = 6


class Controller:
    """Runs while `run` runs. `wake` may be called at any time, from the loop."""

    def __init__(self, store: Store, fleet: Fleet, hub: Hub, measures: Measures) -> None:
        self._store = store
        self._measures = measures
        self._fleet = fleet
        self._hub = hub
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._failures: dict[str, int] = {}
        # When to look at a key again, earliest first, and the time that counts for each key.
        self._timers: list[tuple[int, str]] = []
        self._due_ms: dict[str, int] = {}
        # Endpoints with replicas that found no place, and who of them comes first (highest priority, then
        # oldest): any change of an agent may make room.
        self._waiting: dict[str, tuple[int, int]] = {}
        # Endpoints that go on once the proxies have taken up a route, or let go of a replica.
        self._on_proxies: set[str] = set()
        # An address depends on what the proxies offer: how often that has changed, and as of which change
        # each endpoint was given its address.
        self._offers = 0
        self._addressed: dict[str, int] = {}
        self._running: str | None = None
        # For /metrics: how long runs took, failed ones included, and how many failed.
        self.runs = Histogram()
        self.failed_runs = 0
        self._resync_now = asyncio.Event()

    @property
    def queue_length(self) -> int:
        return len(self._queued)

    def wake(self, uid: str) -> None:
        # The set bounds the queue: each endpoint stands in it once.
        if uid not in self._queued:
            self._queued.add(uid)
            self._queue.put_nowait(uid)

    def wake_at(self, uid: str, at_ms: int) -> None:
        if uid not in self._due_ms or at_ms < self._due_ms[uid]:
            self._due_ms[uid] = at_ms
            heapq.heappush(self._timers, (at_ms, uid))

    def on_commit(self, _revision: int, keys: list[Key]) -> None:
        """The store's listener: changed endpoints, and room for those that wait."""
        for kind, uid in keys:
            if kind == "endpoint":
                # A run that changed its own endpoint has looked again already.
                if uid != self._running:
                    self.wake(uid)
            elif kind == "agent":
                self._fleet.wanted_changed(uid)
                self._wake_waiting()
            elif kind == "proxy":
                # A group's addresses may have changed.
                self._offers += 1
                self._resync_now.set()

    def _wake_waiting(self) -> None:
        for waiting in sorted(self._waiting, key=lambda uid: self._waiting[uid]):
            self.wake(waiting)

    def proxies_moved(self) -> None:
        """A proxy took up a route, let go of a replica, could not bind a port, came or went."""
        for uid in sorted(self._on_proxies):
            self.wake(uid)

    async def build(self) -> None:
        """Publishes every route as stored, before anybody may connect."""
        async with self._store.read() as session:
            rows = await session.scalars(
                select(schema.Endpoint)
                .where(schema.Endpoint.deleted_ms.is_(None))
                .order_by(schema.Endpoint.priority.desc(), schema.Endpoint.uid)
            )
            for row in list(rows):
                self.wake(row.uid)
                if row.validation:
                    continue
                replicas, kernels = await views.living(session, row.uid)
                shown = [views.replica_view(r, kernels.get(r.uid, ()), {}) for r in replicas]
                self._hub.put(routed.route(row, shown, await routed.facts(session, row)))

    async def run(self) -> None:
        """Until cancelled."""
        unlisten = self._store.listen(self.on_commit)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._work())
                group.create_task(self._tick())
                group.create_task(self._resync())
        finally:
            unlisten()

    async def _work(self) -> None:
        while True:
            uid = await self._queue.get()
            self._queued.discard(uid)
            self._due_ms.pop(uid, None)
            began_s = time.monotonic()
            try:
                await self._handle(uid)
                self._failures.pop(uid, None)
            except Exception:
                self.failed_runs += 1
                attempt = self._failures[uid] = self._failures.get(uid, 0) + 1
                delay_s = backoff_s(attempt, first_s=0.2, max_s=30.0, jitter=random.random())
                log.exception("endpoint %s: run failed (%d in a row); again in %.1f s", uid, attempt, delay_s)
                self.wake_at(uid, now_ms() + int(delay_s * 1000))
            self.runs.observe(time.monotonic() - began_s)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = now_ms()
            while self._timers and self._timers[0][0] <= now:
                at_ms, uid = heapq.heappop(self._timers)
                if self._due_ms.get(uid) == at_ms:
                    del self._due_ms[uid]
                    self.wake(uid)
            changed = self._fleet.changed()
            if changed:
                try:
                    await self._wake_endpoints_on(changed)
                except Exception:
                    log.exception("could not look up the endpoints of changed agents; the resync will")

    async def _wake_endpoints_on(self, agents: Iterable[str]) -> None:
        async with self._store.read() as session:
            uids = await session.scalars(
                select(schema.Kernel.endpoint_uid)
                .where(schema.Kernel.agent_uid.in_(list(agents)), schema.Kernel.phase != KernelPhase.GONE)
                .distinct()
            )
            for uid in uids:
                self.wake(uid)
        self._wake_waiting()

    async def _resync(self) -> None:
        while True:
            try:
                async with asyncio.timeout(RESYNC_S):
                    await self._resync_now.wait()
            except TimeoutError:
                pass
            self._resync_now.clear()
            try:
                async with self._store.read() as session:
                    for uid in await session.scalars(
                        select(schema.Endpoint.uid).where(schema.Endpoint.deleted_ms.is_(None))
                    ):
                        self.wake(uid)
                await self._store.compact()
                await prune(self._store)
            except Exception:
                log.exception("resync failed; it comes again in %.0f s", RESYNC_S)

    async def _handle(self, uid: str) -> None:
        self._running = uid
        try:
            async with self._store.write() as tx:
                row = await tx.session.get(schema.Endpoint, uid)
                if row is None or row.deleted_ms is not None:
                    self._forget(uid)
                    return
                offers = self._offers
                if not row.validation and (not row.address or self._addressed.get(uid) != offers):
                    await assign_address(tx, row)
                facts = await routed.facts(tx.session, row)
                for _ in range(ROUNDS_MAX):
                    run = Round(tx, row, facts, self._fleet, self._hub)
                    await run.load()
                    plan = run.decide()
                    await run.apply(plan)
                    if not run.changed or row.deleted_ms is not None:
                        break
                else:
                    plan.look_at(now_ms())
                self._set_status(tx, row, plan, run.shown)
                route = routed.route(row, run.shown, facts)
        finally:
            self._running = None
        # Published only now: a route must never be ahead of the store.
        if row.deleted_ms is not None:
            self._forget(uid)
            return
        if run.pending:
            self._waiting[uid] = (-row.priority, row.created_ms)
        else:
            self._waiting.pop(uid, None)
        if row.validation:
            # No route leads to it, so no proxy is waited for.
            if plan.look_again_ms is not None:
                self.wake_at(uid, plan.look_again_ms)
            return
        self._addressed[uid] = offers
        self._hub.put(route)
        self._measures.compose(
            uid,
            [replica.uid for replica in run.shown if in_route(replica)],
            [
                kernel.uid
                for replica in run.shown
                for kernel in replica.kernels
                if kernel.phase is KernelPhase.RUNNING
            ],
        )
        published = self._hub.published(route, row.proxy_group)
        _keep(self._on_proxies, uid, not published or any(replica.draining for replica in run.shown))
        if not published:
            plan.look_at(now_ms() + APPLY_WAIT_MS)
        if plan.look_again_ms is not None:
            self.wake_at(uid, plan.look_again_ms)

    def _forget(self, uid: str) -> None:
        self._hub.remove(uid)
        self._waiting.pop(uid, None)
        self._addressed.pop(uid, None)
        self._on_proxies.discard(uid)

    def _set_status(self, tx: Tx, row: schema.Endpoint, plan: Plan, shown: list[ReplicaView]) -> None:
        status = plan.status
        # One that was healthy does not stop being so while proxies take up a route with one more target.
        if status is EndpointStatus.DEGRADED and row.status == EndpointStatus.HEALTHY:
            serving = sum(1 for replica in shown if in_route(replica))
            if serving >= row.desired_replicas > 0:
                status = EndpointStatus.HEALTHY
        ready = sum(1 for replica in shown if in_route(replica))
        if row.idle and ready and row.desired_replicas:
            # Woken, and up: requests are no longer held.
            row.idle = False
            tx.touch("endpoint", row.uid)
        conditions = [
            {
                "type": "PORT_NOT_BOUND",
                "message": f"proxy {name} cannot bind port {failure.port}: {failure.detail}; "
                "stop what holds the port, or delete the endpoint and create it again",
            }
            for name, failure in self._hub.bind_failures(row.uid)
        ]
        if not row.address and not row.validation:
            conditions.append(
                {
                    "type": "NO_ADDRESS",
                    "message": f"no app proxy of group `{row.proxy_group}` has joined, or its ports are all "
                    "taken; start one with `dure proxy`",
                }
            )
        before = (row.status, row.status_reason, row.ready_replicas, row.conditions)
        reason = "" if status is EndpointStatus.HEALTHY else plan.reason
        after = (status.value, reason[:4000], ready, conditions)
        if before == after:
            return
        if row.status != status.value:
            sentence = f"status is {status.value}" + (f": {reason}" if reason else "")
            warning = status in (EndpointStatus.BLOCKED, EndpointStatus.UNHEALTHY)
            tx.event(row.uid, f"ENDPOINT_{status.value}", sentence, warning=warning)
        row.status, row.status_reason, row.ready_replicas, row.conditions = after
        tx.touch("endpoint", row.uid)


def _keep(keys: set[str], key: str, wanted: bool) -> None:
    if wanted:
        keys.add(key)
    else:
        keys.discard(key)
