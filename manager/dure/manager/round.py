"""One round for one endpoint, inside a transaction: load, decide, apply, place."""

from __future__ import annotations

import time

from dure.manager import placing, rollout, routed, schema, views
from dure.manager.addresses import release_address
from dure.manager.fleet import Fleet
from dure.manager.hub import Hub
from dure.manager.model import (
    ENDED,
    KernelPhase,
    ReplicaStatus,
    ReplicaView,
    RolloutState,
    Surroundings,
)
from dure.manager.placement import Node, Placed, Request, fuller, place
from dure.manager.plan import Move, Plan
from dure.manager.replicas import reconcile
from dure.manager.routed import Facts
from dure.manager.store import Tx, new_uid, now_ms

ERRORS_KEPT = 10


class Round:
    """One round for one endpoint, inside a transaction."""

    def __init__(self, tx: Tx, row: schema.Endpoint, facts: Facts, fleet: Fleet, hub: Hub) -> None:
        self.tx = tx
        self.row = row
        self.facts = facts
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
        agent_names, self.emptying = await views.agents(session, agents)
        self.shown = [views.replica_view(row, self.kernels.get(row.uid, ()), agent_names) for row in rows]
        self.route = routed.route(self.row, self.shown, self.facts)

    def decide(self) -> Plan:
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
            emptying=self.emptying,
            drained=frozenset(self.rows) if self.row.validation else self.hub.drained(self.row.proxy_group),
            published=self.row.validation or self.hub.published(self.route, self.row.proxy_group),
            lingering=lingering,
        )
        return reconcile(views.endpoint_view(self.row), self.shown, around)

    async def apply(self, plan: Plan) -> None:
        for move in plan.moves:
            self._move(move)
        for uid in plan.stop:
            self._stop_kernels(uid)
        self._count_failures(plan)
        await self._roll(plan)
        for revision, count in plan.create.items():
            for _ in range(count):
                self._create(revision)
        if not self.row.deleting:
            await self._place()
        if plan.gone:
            await self._finish()

    def _move(self, move: Move) -> None:
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

    def _count_failures(self, plan: Plan) -> None:
        row = self.row
        at = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        errors = ([] if plan.clear_errors else list(row.errors)) + [f"{at} {text}" for text in plan.errors]
        kept = errors[-ERRORS_KEPT:]
        after = (plan.failures, plan.failed_ms, plan.evictions, plan.evicted_ms, plan.last_error)
        before = (row.failures, row.failed_ms, row.evictions, row.evicted_ms, row.last_error)
        if (list(row.errors), row.blocked, before) != (kept, plan.blocked, after):
            row.errors, row.blocked = kept, plan.blocked
            row.failures, row.failed_ms, row.evictions, row.evicted_ms, row.last_error = after
            self._mark()

    async def _roll(self, plan: Plan) -> None:
        """Keeps where the rollout stands, or gives it up for the stable revision."""
        row = self.row
        if plan.rollback:
            revision = await self.tx.session.get_one(schema.Revision, (row.uid, row.revision))
            revision.failed = plan.rollback[:4000]
            sentence = (
                f"the rollout of revision {row.revision} failed, revision {row.stable_revision} stays: "
                f"{plan.rollback}"
            )
            self.tx.event(row.uid, "ROLLOUT_FAILED", sentence, warning=True)
            row.revision, row.errors = row.stable_revision, [sentence[:4000]]
            row.failures, row.failed_ms, row.evictions, row.evicted_ms = 0, 0, 0, 0
            row.etag = new_uid()
        after = (rollout.store_state(plan.rollout), plan.stable)
        before = (row.rollout, row.stable_revision)
        if before == after and not plan.rollback:
            return
        if plan.stable != row.stable_revision:
            sentence = f"all {row.desired_replicas} replica(s) of revision {plan.stable} are healthy"
            self.tx.event(row.uid, "ROLLOUT_FINISHED", sentence)
        elif plan.rollout is not None:
            self._tell_of_rollout(rollout.load_state(row.rollout), plan.rollout)
        row.rollout, row.stable_revision = after
        self._mark()

    def _tell_of_rollout(self, before: RolloutState | None, after: RolloutState) -> None:
        policy = views.endpoint_view(self.row).policy
        number = after.revision
        if before is None or before.revision != number:
            sentence = f"revision {number} is rolled out, {policy.strategy.value.lower().replace('_', '-')}"
            self.tx.event(self.row.uid, "ROLLOUT_STARTED", sentence)
        elif after.paused and not before.paused:
            sentence = f"the rollout of revision {number} is paused: {after.reason}"
            self.tx.event(self.row.uid, "ROLLOUT_PAUSED", sentence, warning=True)
        elif (after.step, after.full) != (before.step, before.full):
            step = rollout.canary_step(after, policy)
            where = f"takes step {step}" if step else "takes all requests step by step"
            self.tx.event(self.row.uid, "ROLLOUT_STEP", f"revision {number} {where}")

    def _create(self, revision: int) -> None:
        now = now_ms()
        row = schema.Replica(
            uid=new_uid(),
            endpoint_uid=self.row.uid,
            revision=revision,
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
        peers = placing.peers(
            kernel
            for uid, kernels in self.kernels.items()
            if uid in self.rows and self.rows[uid].ended_ms is None
            for kernel in kernels
        )
        nodes: dict[str, list[Node]] = {}
        refused: dict[int, str] = {}
        for row in waiting:
            # A second replica of a revision that found no place would hear the same.
            if row.revision not in refused:
                revision = await session.get_one(schema.Revision, (self.row.uid, row.revision))
                request = await placing.request(session, revision, peers, row.uid)
                group = request.resource_group
                if group not in nodes:
                    nodes[group] = await views.nodes(session, group, self.fleet.statuses())
                placed = place(request, nodes[group])
                if isinstance(placed, Placed):
                    self._grant(row, placed, request)
                    main = placed.kernels[0].node.uid
                    peers[main] = peers.get(main, 0) + 1
                    for kernel in placed.kernels:
                        nodes[group] = [fuller(node, kernel.grant) for node in nodes[group]]
                    continue
                refused[row.revision] = placed.sentence(request)
            self.pending = True
            if row.reason != refused[row.revision]:
                row.reason = refused[row.revision]
                self._mark()
                if row is waiting[0]:
                    self.tx.event(self.row.uid, "REPLICA_PENDING", row.reason, replica=row.uid)

    def _grant(self, row: schema.Replica, placed: Placed, request: Request) -> None:
        kernels = placing.kernels(row, placed, request)
        if len(kernels) > 1:
            row.ssh_key = placing.new_ssh_key()
        self.tx.session.add_all(kernels)
        for kernel in kernels:
            self.tx.touch("agent", kernel.agent_uid)
        row.status, row.reason, row.since_ms = ReplicaStatus.STARTING.value, "", now_ms()
        sentence = f"replica {row.uid[-6:]} starts on {placed.nodes}"
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
