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
from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import replicas as decisions
from dure.manager import routes, schema, views
from dure.manager.addresses import assign_address, release_address
from dure.manager.fleet import Fleet
from dure.manager.hub import APPLY_WAIT_MS, Hub
from dure.manager.model import (
    ENDED,
    EndpointStatus,
    KernelHealth,
    KernelPhase,
    ReplicaStatus,
    ReplicaView,
    Surroundings,
)
from dure.manager.placement import Placed, Request, place
from dure.manager.retention import prune
from dure.manager.store import Key, Store, Tx, new_uid, now_ms
from dure.routing.v1 import routing_pb2
from dure.wire.backoff import backoff_s

log = logging.getLogger(__name__)

RESYNC_S = 30.0
TICK_S = 0.25
ERRORS_KEPT = 10
# A decision may call for another at once (created, then placed, then counted); it settles in two or three.
ROUNDS_MAX = 6


class Controller:
    """Runs while `run` runs. `wake` may be called at any time, from the loop."""

    def __init__(self, store: Store, fleet: Fleet, hub: Hub) -> None:
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._failures: dict[str, int] = {}
        # When to look at a key again, earliest first, and the time that counts for each key.
        self._timers: list[tuple[int, str]] = []
        self._due_ms: dict[str, int] = {}
        # Endpoints with replicas that found no place: any change of an agent may make room.
        self._waiting: set[str] = set()
        # Endpoints that go on once the proxies have taken up a route, or let go of a replica.
        self._on_proxies: set[str] = set()
        self._running: str | None = None
        self._resync_now = asyncio.Event()

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
                for waiting in sorted(self._waiting):
                    self.wake(waiting)
            elif kind == "proxy":
                # A group's addresses may have changed.
                self._resync_now.set()

    def proxies_moved(self) -> None:
        """A proxy took up a route, let go of a replica, could not bind a port, came or went."""
        for uid in sorted(self._on_proxies):
            self.wake(uid)

    async def build(self) -> None:
        """Publishes every route as stored, before anybody may connect."""
        async with self._store.read() as session:
            rows = await session.scalars(select(schema.Endpoint).where(schema.Endpoint.deleted_ms.is_(None)))
            for row in list(rows):
                replicas, kernels = await views.living(session, row.uid)
                shown = [views.replica_view(r, kernels.get(r.uid, ()), {}) for r in replicas]
                self._hub.put(await _route(session, row, shown))
                self.wake(row.uid)

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
            try:
                await self._handle(uid)
                self._failures.pop(uid, None)
            except Exception:
                attempt = self._failures[uid] = self._failures.get(uid, 0) + 1
                delay_s = backoff_s(attempt, first_s=0.2, max_s=30.0, jitter=random.random())
                log.exception("endpoint %s: run failed (%d in a row); again in %.1f s", uid, attempt, delay_s)
                self.wake_at(uid, now_ms() + int(delay_s * 1000))

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
            for uid in {*uids, *self._waiting}:
                self.wake(uid)

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
                await assign_address(tx, row)
                for _ in range(ROUNDS_MAX):
                    run = _Run(tx, row, self._fleet, self._hub)
                    await run.load()
                    plan = run.decide()
                    await run.apply(plan)
                    if not run.changed or row.deleted_ms is not None:
                        break
                else:
                    plan.look_at(now_ms())
                self._set_status(tx, row, plan, run.shown)
                route = await _route(tx.session, row, run.shown)
        finally:
            self._running = None
        # Published only now: a route must never be ahead of the store.
        if row.deleted_ms is not None:
            self._forget(uid)
            return
        self._hub.put(route)
        _keep(self._waiting, uid, run.pending)
        published = self._hub.published(route, row.proxy_group)
        _keep(self._on_proxies, uid, not published or any(replica.draining for replica in run.shown))
        if not published:
            plan.look_at(now_ms() + APPLY_WAIT_MS)
        if plan.look_again_ms is not None:
            self.wake_at(uid, plan.look_again_ms)

    def _forget(self, uid: str) -> None:
        self._hub.remove(uid)
        self._waiting.discard(uid)
        self._on_proxies.discard(uid)

    def _set_status(
        self, tx: Tx, row: schema.Endpoint, plan: decisions.Plan, shown: list[ReplicaView]
    ) -> None:
        status = plan.status
        # One that was healthy does not stop being so while proxies take up a route with one more target.
        if status is EndpointStatus.DEGRADED and row.status == EndpointStatus.HEALTHY:
            serving = sum(1 for replica in shown if decisions.in_route(replica))
            if serving >= row.desired_replicas > 0:
                status = EndpointStatus.HEALTHY
        ready = sum(1 for replica in shown if decisions.in_route(replica))
        conditions = [
            {
                "type": "PORT_NOT_BOUND",
                "message": f"proxy {name} cannot bind port {failure.port}: {failure.detail}; "
                "stop what holds the port, or delete the endpoint and create it again",
            }
            for name, failure in self._hub.bind_failures(row.uid)
        ]
        if not row.address:
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


async def _route(session: AsyncSession, row: schema.Endpoint, shown: list[ReplicaView]) -> routing_pb2.Route:
    project = await session.get(schema.Project, row.project_uid)
    revoked = await session.scalars(
        select(schema.Token.uid).where(
            schema.Token.endpoint_uid == row.uid,
            schema.Token.revoked_ms.is_not(None),
            schema.Token.expires_s * 1000 > now_ms(),
        )
    )
    return routes.route(
        uid=row.uid,
        project=project.name if project is not None else "",
        name=row.name,
        port=row.port or 0,
        label=routes.host_label(row.name, row.uid),
        open_to_public=row.open_to_public,
        status=EndpointStatus(row.status),
        replicas=shown,
        revoked_tokens=list(revoked),
    )


class _Run:
    """One round for one endpoint, inside a transaction."""

    def __init__(self, tx: Tx, row: schema.Endpoint, fleet: Fleet, hub: Hub) -> None:
        self.tx = tx
        self.row = row
        self.fleet = fleet
        self.hub = hub
        self.changed = False
        self.shown: list[ReplicaView] = []
        self.pending = False

    async def load(self) -> None:
        session = self.tx.session
        await session.flush()
        rows, self.kernels = await views.living(session, self.row.uid)
        self.rows = {row.uid: row for row in rows}
        agents = {kernel.agent_uid for kernels in self.kernels.values() for kernel in kernels}
        agent_names = await views.agent_names(session, agents)
        self.shown = [views.replica_view(row, self.kernels.get(row.uid, ()), agent_names) for row in rows]
        self.route = await _route(session, self.row, self.shown)

    def decide(self) -> decisions.Plan:
        given_up = self.fleet.given_up()
        lingering = sum(
            1
            for replica_uid, kernels in self.kernels.items()
            if replica_uid not in self.rows
            for kernel in kernels
            if kernel.phase != KernelPhase.GONE and kernel.agent_uid not in given_up
        )
        around = Surroundings(
            now_ms=now_ms(),
            lost_ms=self.fleet.away_ms(),
            given_up=given_up,
            drained=self.hub.drained(self.row.proxy_group),
            published=self.hub.published(self.route, self.row.proxy_group),
            lingering=lingering,
        )
        return decisions.reconcile(views.endpoint_view(self.row), self.shown, around)

    async def apply(self, plan: decisions.Plan) -> None:
        for move in plan.moves:
            self._move(move)
        for uid in plan.stop:
            self._stop_kernels(uid)
        self._count_failures(plan)
        for _ in range(plan.create):
            self._create()
        if not self.row.deleting:
            await self._place()
        if plan.gone:
            await self._finish()

    def _move(self, move: decisions.Move) -> None:
        row, now = self.rows[move.uid], now_ms()
        row.since_ms = now if row.status != move.status else row.since_ms
        row.status, row.reason = move.status.value, move.reason[:4000]
        if move.status is ReplicaStatus.HEALTHY:
            row.was_healthy, row.healthy_since_ms = True, now
        row.draining = move.drain
        if move.status in ENDED:
            row.ended_ms = now
        if move.stop:
            self._stop_kernels(move.uid)
        if move.event:
            label = f"replica {move.uid[-6:]}"
            if kernels := self.shown_of(move.uid).kernels:
                label += f" on {kernels[0].agent_name}"
            self.tx.event(
                self.row.uid,
                move.event,
                f"{label}: {move.reason or move.status.value.lower()}",
                replica=move.uid,
                warning=move.warning,
            )
        self._mark()

    def shown_of(self, uid: str) -> ReplicaView:
        return next(replica for replica in self.shown if replica.uid == uid)

    def _stop_kernels(self, replica_uid: str) -> None:
        for kernel in self.kernels.get(replica_uid, ()):
            if kernel.wanted:
                kernel.wanted = False
                kernel.generation += 1
                self.tx.touch("agent", kernel.agent_uid)
                self._mark()

    def _count_failures(self, plan: decisions.Plan) -> None:
        row = self.row
        errors = ([] if plan.clear_errors else list(row.errors)) + plan.errors
        after = (errors[-ERRORS_KEPT:], plan.failures, plan.failed_ms, plan.blocked)
        if (list(row.errors), row.failures, row.failed_ms, row.blocked) != after:
            row.errors, row.failures, row.failed_ms, row.blocked = after
            self._mark()

    def _create(self) -> None:
        now = now_ms()
        row = schema.Replica(
            uid=new_uid(),
            endpoint_uid=self.row.uid,
            revision=self.row.revision,
            session_uid=new_uid(),
            status=ReplicaStatus.PENDING.value,
            reason="",
            created_ms=now,
            since_ms=now,
            was_healthy=False,
            healthy_since_ms=0,
            draining=False,
            ended_ms=None,
        )
        self.tx.session.add(row)
        self.rows[row.uid] = row
        self._mark()

    async def _place(self) -> None:
        waiting = [row for row in self.rows.values() if row.status == ReplicaStatus.PENDING]
        self.pending = False
        if not waiting:
            return
        session = self.tx.session
        await session.flush()
        peers: dict[str, int] = {}
        for uid, kernels in self.kernels.items():
            if uid in self.rows and self.rows[uid].ended_ms is None:
                peers[kernels[0].agent_uid] = peers.get(kernels[0].agent_uid, 0) + 1
        statuses = self.fleet.statuses()
        refused: dict[int, str] = {}
        for row in waiting:
            # A second replica of a revision that found no place would hear the same.
            if row.revision not in refused:
                spec, fixed_port = await self._spec(row.revision)
                request = Request(spec["slots"], spec["resource_group"], fixed_port, peers)
                placed = place(request, await views.nodes(session, spec["resource_group"], statuses))
                if isinstance(placed, Placed):
                    self._grant(row, placed)
                    peers[placed.node.uid] = peers.get(placed.node.uid, 0) + 1
                    await session.flush()
                    continue
                refused[row.revision] = placed.sentence(request)
            self.pending = True
            if row.reason != refused[row.revision]:
                row.reason = refused[row.revision]
                self._mark()
                if row is waiting[0]:
                    self.tx.event(self.row.uid, "REPLICA_PENDING", row.reason, replica=row.uid)

    async def _spec(self, number: int) -> tuple[dict[str, Any], int]:
        revision = await self.tx.session.get_one(schema.Revision, (self.row.uid, number))
        template = fleet_pb2.KernelSpec.FromString(revision.kernel)
        return revision.spec, template.port if template.fixed_port else 0

    def _grant(self, row: schema.Replica, placed: Placed) -> None:
        grant = placed.grant
        kernel = schema.Kernel(
            uid=new_uid(),
            replica_uid=row.uid,
            endpoint_uid=self.row.uid,
            session_uid=row.session_uid,
            agent_uid=grant.agent_uid,
            role="main",
            index=1,
            generation=1,
            wanted=True,
            slots=dict(grant.slots),
            devices=[{"device": d.device, "slot": d.slot, "amount": d.amount} for d in grant.devices],
            fixed_port=grant.fixed_port,
            phase=KernelPhase.ASSIGNED.value,
            health=KernelHealth.UNKNOWN.value,
            status=b"",
        )
        self.tx.session.add(kernel)
        row.status, row.reason, row.since_ms = ReplicaStatus.STARTING.value, "", now_ms()
        self.tx.touch("agent", grant.agent_uid)
        self.tx.event(
            self.row.uid,
            "REPLICA_PLACED",
            f"replica {row.uid[-6:]} starts on {placed.node.name}",
            replica=row.uid,
        )
        self._mark()

    async def _finish(self) -> None:
        """Everything of a deleted endpoint has ended: its address rests, its name is free."""
        await release_address(self.tx, self.row)
        self.row.deleted_ms, self.row.living_name = now_ms(), None
        self.tx.event(self.row.uid, "ENDPOINT_DELETED", "all replicas have ended; the address is released")
        self._mark()

    def _mark(self) -> None:
        self.changed = True
        self.tx.touch("endpoint", self.row.uid)
