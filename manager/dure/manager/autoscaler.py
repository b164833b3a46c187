"""The autoscaler: looks at the rules of an endpoint when a measurement of it has changed, and moves
`desired_replicas`. It alone does so beside the user.

What it decides is `dure.scaling.decide`, a pure function; here are its inputs (rules as stored, samples from
`measures`, who is away) and what follows: one transaction that guards against another owner of the number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import quota, schema
from dure.manager.fleet import Fleet
from dure.manager.hub import Hub
from dure.manager.measures import Measures
from dure.manager.model import KernelPhase
from dure.manager.store import Key, Store, new_uid, now_ms
from dure.scaling.decide import decide
from dure.scaling.values import Comparator, Decision, Rule, Situation, Source
from dure.wire.errors import ResourceExhausted

log = logging.getLogger(__name__)

TICK_S = 0.1
# An endpoint is looked at this often at most, however often it is measured.
EVERY_MS = 1_000
# Idle endpoints send no measurements that would wake the evaluation; they are looked at this often.
IDLE_EVERY_MS = 2_000
# A proxy that is away for longer than this is not coming back; what it saw is no longer missed.
PROXY_AWAY_MS = 60_000
DECISIONS_KEPT = 200
MEASURE_MS, MEASURE_RULE_MS = 5_000, 1_000
FLEET_EVERY_MS = 5_000


@dataclass(frozen=True)
class Config:
    """What is stored of an endpoint's scaling."""

    name: str
    desired: int
    scale_to_zero_ms: int
    group: str
    active: bool
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Looked:
    """An evaluation: when (Unix ms), from how many replicas, what came of it."""

    at_ms: int
    before: int
    decision: Decision


class Autoscaler:
    """Runs while `run` runs. `changed` may be called at any time, from the loop."""

    def __init__(self, store: Store, fleet: Fleet, hub: Hub, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._clock_ms = clock_ms
        self.measures = Measures(clock_ms, self.changed)
        self._started_ms = clock_ms()
        self._configs: dict[str, Config] = {}
        self._stale: set[str] = set()
        self._dirty: dict[str, None] = {}
        self._looked_ms: dict[str, int] = {}
        self.newest: dict[str, Looked] = {}
        self._fleet_ms = 0

    def changed(self, endpoint_uid: str) -> None:
        """Something of an endpoint was measured."""
        # Bounded by the endpoints that there are.
        self._dirty[endpoint_uid] = None

    def on_commit(self, _revision: int, keys: list[Key]) -> None:
        for kind, uid in keys:
            if kind == "endpoint":
                self._stale.add(uid)

    async def run(self) -> None:
        """Until cancelled."""
        unlisten = self._store.listen(self.on_commit)
        try:
            async with self._store.read() as session:
                self._stale |= set(
                    await session.scalars(
                        select(schema.Endpoint.uid).where(
                            schema.Endpoint.deleted_ms.is_(None), schema.Endpoint.validation.is_(False)
                        )
                    )
                )
            while True:
                try:
                    await self._tick()
                except Exception:
                    log.exception("a look at the scaling rules failed; the next is in a second")
                    await asyncio.sleep(1.0)
                await asyncio.sleep(TICK_S)
        finally:
            unlisten()

    async def _tick(self) -> None:
        if self._stale:
            await self._reload()
        now = self._clock_ms()
        for uid, config in self._configs.items():
            if config.scale_to_zero_ms and now - self._looked_ms.get(uid, 0) >= IDLE_EVERY_MS:
                self._dirty[uid] = None
        for uid in list(self._dirty):
            held = self.measures.is_held(uid)
            if not held and now - self._looked_ms.get(uid, 0) < EVERY_MS:
                continue
            del self._dirty[uid]
            self._looked_ms[uid] = now
            if uid in self._configs:
                await self._look(uid, self._configs[uid], held=held)
        if now - self._fleet_ms >= FLEET_EVERY_MS:
            self._fleet_ms = now
            await self._set_intervals()

    async def _look(self, uid: str, config: Config, *, held: bool) -> None:
        if not config.active or not (config.rules or config.scale_to_zero_ms or held):
            return
        now = now_ms()
        situation = Situation(
            now_ms=now,
            desired=config.desired,
            idle_ms=self._idle_ms(uid, config),
            scale_to_zero_ms=config.scale_to_zero_ms,
            held=held,
            proxies_away=self._proxies_away(config.group),
        )
        decision = decide(config.rules, self.measures.samples(uid), situation)
        self.newest[uid] = Looked(now, config.desired, decision)
        if decision.cause and decision.desired != config.desired:
            await self._apply(uid, config, decision)

    async def _apply(self, uid: str, config: Config, decision: Decision) -> None:
        now = now_ms()
        try:
            async with self._store.write() as tx:
                row = await tx.session.get(schema.Endpoint, uid)
                # Somebody else moved the number meanwhile: what was seen belongs to another one.
                if row is None or row.deleting or row.blocked or row.desired_replicas != config.desired:
                    self._stale.add(uid)
                    return
                if decision.desired > config.desired:
                    await self._check_quota(tx.session, row, decision.desired)
                row.desired_replicas = decision.desired
                row.idle = decision.desired == 0 or decision.cause == "request"
                await tx.session.execute(
                    schema.ScalingRule.__table__.update()  # type: ignore[attr-defined]
                    .where(schema.ScalingRule.endpoint_uid == uid, schema.ScalingRule.name == decision.cause)
                    .values(fired_ms=now)
                )
                tx.session.add(_row(uid, now, config.desired, decision))
                sentence = f"{config.desired} -> {decision.desired} replica(s): {decision.reason}"
                tx.event(uid, "ENDPOINT_SCALED", f"{decision.cause}: {sentence}")
                tx.touch("endpoint", uid)
                await _forget_old(tx.session, uid)
        except ResourceExhausted as error:
            refused = Decision(config.desired, "", error.message, decision.verdicts)
            self.newest[uid] = Looked(now, config.desired, refused)
            return
        # The next look must not see the old number: on_commit has marked it, this makes it so at once.
        await self._reload()

    async def _check_quota(self, session: AsyncSession, row: schema.Endpoint, count: int) -> None:
        project = await session.get_one(schema.Project, row.project_uid)
        revision = await session.get_one(schema.Revision, (row.uid, row.revision))
        spec = revision.spec
        await quota.check(session, project, row.uid, count, spec["cluster_size"], spec["slots"])

    async def _reload(self) -> None:
        """Reads what has changed of endpoints and rules."""
        uids, self._stale = list(self._stale), set()
        async with self._store.read() as session:
            for start in range(0, len(uids), 500):
                some = uids[start : start + 500]
                rows = await session.scalars(select(schema.Endpoint).where(schema.Endpoint.uid.in_(some)))
                rules: dict[str, list[Rule]] = {}
                for rule in await session.scalars(
                    select(schema.ScalingRule)
                    .where(schema.ScalingRule.endpoint_uid.in_(some))
                    .order_by(schema.ScalingRule.uid)
                ):
                    rules.setdefault(rule.endpoint_uid, []).append(rule_of(rule))
                for row in list(rows):
                    self._take(row, tuple(rules.get(row.uid, ())))

    def _take(self, row: schema.Endpoint, rules: tuple[Rule, ...]) -> None:
        if row.deleted_ms is not None or row.validation:
            self._configs.pop(row.uid, None)
            self._looked_ms.pop(row.uid, None)
            self._dirty.pop(row.uid, None)
            self.newest.pop(row.uid, None)
            self.measures.forget(row.uid)
            return
        stopped = row.desired_replicas == 0 and not row.idle
        self._configs[row.uid] = Config(
            row.name,
            row.desired_replicas,
            row.scale_to_zero_ms,
            row.proxy_group,
            active=not (row.deleting or row.blocked or stopped),
            rules=rules,
        )
        self.measures.want(row.uid, [(rule.source, rule.metric, rule.window_ms) for rule in rules])

    def _idle_ms(self, uid: str, config: Config) -> int | None:
        """How long no request has come, None if nobody can know."""
        known_since = self._hub.watched_since_ms(config.group)
        if known_since is None or self._proxies_away(config.group):
            return None
        last = max(self.measures.active_ms(uid), self.measures.serving_since_ms(uid), known_since)
        return self._clock_ms() - last

    def _proxies_away(self, group: str) -> bool:
        return self._hub.away(group, max_ms=PROXY_AWAY_MS, started_ms=self._started_ms)

    async def _set_intervals(self) -> None:
        """Kernels are measured every second where a rule looks at them."""
        watched = [
            uid
            for uid, config in self._configs.items()
            if config.active and any(rule.source is Source.KERNEL and rule.enabled for rule in config.rules)
        ]
        agents: set[str] = set()
        if watched:
            async with self._store.read() as session:
                for start in range(0, len(watched), 500):
                    agents |= set(
                        await session.scalars(
                            select(schema.Kernel.agent_uid)
                            .where(
                                schema.Kernel.endpoint_uid.in_(watched[start : start + 500]),
                                schema.Kernel.phase != KernelPhase.GONE,
                            )
                            .distinct()
                        )
                    )
        self._fleet.measure(agents, MEASURE_RULE_MS, MEASURE_MS)


def rule_of(row: schema.ScalingRule) -> Rule:
    return Rule(
        row.name,
        Source(row.source),
        row.metric,
        Comparator(row.comparator),
        float(row.threshold),
        row.step,
        row.min_replicas,
        row.max_replicas,
        row.cooldown_ms,
        row.window_ms,
        row.enabled,
        row.clamp,
        row.fired_ms,
    )


def _row(uid: str, at_ms: int, before: int, decision: Decision) -> schema.ScalingDecision:
    return schema.ScalingDecision(
        uid=new_uid(),
        endpoint_uid=uid,
        time_ms=at_ms,
        from_replicas=before,
        to_replicas=decision.desired,
        cause=decision.cause,
        reason=decision.reason,
        verdicts=[
            {"rule": v.rule, "fired": v.fired, "value": v.value, "reason": v.reason}
            for v in decision.verdicts
        ],
    )


async def _forget_old(session: AsyncSession, uid: str) -> None:
    mine = schema.ScalingDecision.endpoint_uid == uid
    newest = select(schema.ScalingDecision.uid).where(mine).order_by(schema.ScalingDecision.uid.desc())
    last_kept = await session.scalar(newest.offset(DECISIONS_KEPT - 1).limit(1))
    if last_kept is not None:
        await session.execute(
            delete(schema.ScalingDecision).where(mine, schema.ScalingDecision.uid < last_kept)
        )
