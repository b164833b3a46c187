"""One round for one endpoint, inside a transaction: load, decide, apply, place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import replicas as decisions
from dure.manager import routes, schema, views
from dure.manager.addresses import release_address
from dure.manager.fleet import Fleet
from dure.manager.hub import Hub
from dure.manager.model import (
    ENDED,
    EndpointStatus,
    KernelHealth,
    KernelPhase,
    ReplicaStatus,
    ReplicaView,
    Surroundings,
)
from dure.manager.placement import Node, Placed, Request, place
from dure.manager.store import Tx, new_uid, now_ms
from dure.routing.v1 import routing_pb2

ERRORS_KEPT = 10


class Round:
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
        self.route = await current_route(session, self.row, self.shown)

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
        nodes: dict[str, list[Node]] = {}
        refused: dict[int, str] = {}
        for row in waiting:
            # A second replica of a revision that found no place would hear the same.
            if row.revision not in refused:
                spec, fixed_port = await self._spec(row.revision)
                group = spec["resource_group"]
                if group not in nodes:
                    nodes[group] = await views.nodes(session, group, self.fleet.statuses())
                request = Request(spec["slots"], group, fixed_port, peers)
                placed = place(request, nodes[group])
                if isinstance(placed, Placed):
                    self._grant(row, placed)
                    peers[placed.node.uid] = peers.get(placed.node.uid, 0) + 1
                    fuller = replace(placed.node, grants=(*placed.node.grants, placed.grant))
                    nodes[group] = [fuller if node.uid == fuller.uid else node for node in nodes[group]]
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
        sentence = f"replica {row.uid[-6:]} starts on {placed.node.name}"
        self.tx.event(self.row.uid, "REPLICA_PLACED", sentence, replica=row.uid)
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


async def current_route(
    session: AsyncSession, row: schema.Endpoint, shown: list[ReplicaView]
) -> routing_pb2.Route:
    """The route of an endpoint as it should be now."""
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
