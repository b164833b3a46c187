"""A small world that does what the reconciler's plans say: no store, no agents, a clock of its own."""

from dataclasses import dataclass, field, replace

from dure.manager.model import (
    ENDED,
    EndpointView,
    Exit,
    KernelHealth,
    KernelPhase,
    KernelView,
    ReplicaStatus,
    ReplicaView,
    Surroundings,
)
from dure.manager.plan import Plan
from dure.manager.replicas import reconcile
from dure.manager.serving import in_route, traffic

S = ReplicaStatus


@dataclass
class World:
    """Replicas on agents `a0`, `a1` ..., the clock, and how to make them live."""

    desired: int = 2
    now_ms: int = 1_000_000
    endpoint: EndpointView = field(init=False)
    replicas: dict[str, ReplicaView] = field(default_factory=dict)
    given_up: frozenset[str] = frozenset()
    lost_ms: dict[str, int] = field(default_factory=dict)
    emptying: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    rollbacks: list[str] = field(default_factory=list)
    made: int = 0
    newest: int = 1
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        self.endpoint = EndpointView("e", "e", self.desired, 1)

    def revise(self) -> None:
        """What an update of the endpoint does."""
        self.newest += 1
        self.endpoint = replace(
            self.endpoint, revision=self.newest, blocked=False, errors=(), failures=0, failed_ms=0
        )

    def living(self) -> list[ReplicaView]:
        return [replica for replica in self.replicas.values() if replica.status not in ENDED]

    def serving(self) -> int:
        return sum(1 for replica in self.living() if in_route(replica))

    def run(self) -> Plan:
        """Rounds until nothing changes."""
        for _ in range(12):
            around = Surroundings(
                self.now_ms,
                self.lost_ms,
                given_up=self.given_up,
                emptying=self.emptying,
                drained=self.drained,
            )
            before = self.endpoint
            plan = self.plan = reconcile(self.endpoint, self.living(), around)
            self._apply(plan)
            if not (plan.moves or plan.create or plan.stop) and self.endpoint == before:
                return plan
        raise AssertionError("does not settle")

    def _apply(self, plan: Plan) -> None:
        errors = (() if plan.clear_errors else self.endpoint.errors) + tuple(plan.errors)
        self.endpoint = replace(
            self.endpoint,
            errors=errors,
            failures=plan.failures,
            failed_ms=plan.failed_ms,
            evictions=plan.evictions,
            evicted_ms=plan.evicted_ms,
            last_error=plan.last_error,
            blocked=plan.blocked,
            rollout=plan.rollout,
            stable=plan.stable,
        )
        if plan.rollback:
            self.rollbacks.append(plan.rollback)
            self.endpoint = replace(self.endpoint, revision=plan.stable, failures=0, failed_ms=0, errors=())
        for move in plan.moves:
            old = self.replicas[move.uid]
            self.replicas[move.uid] = replace(
                old,
                status=move.status,
                since_ms=self.now_ms if old.status is not move.status else old.since_ms,
                was_healthy=old.was_healthy or move.status is S.HEALTHY,
                healthy_since_ms=self.now_ms if move.status is S.HEALTHY else old.healthy_since_ms,
                draining=move.drain,
                reason=move.reason,
                kernels=self._unwanted(old) if move.stop else old.kernels,
            )
        for uid in plan.stop:
            self.replicas[uid] = replace(self.replicas[uid], kernels=self._unwanted(self.replicas[uid]))
        for revision in [number for number, count in plan.create.items() for _ in range(count)]:
            self.made += 1
            uid = f"r{self.made:04}"
            agents = [f"a{index}" for index in range(3) if f"a{index}" not in self.given_up | self.emptying]
            agent = agents[self.made % len(agents)]
            kernel = KernelView(
                f"k-{uid}", agent, agent, KernelPhase.ASSIGNED, KernelHealth.UNKNOWN, True, "h", 1
            )
            self.replicas[uid] = ReplicaView(uid, revision, S.STARTING, self.now_ms, self.now_ms, (kernel,))

    def _unwanted(self, replica: ReplicaView) -> tuple[KernelView, ...]:
        return tuple(replace(kernel, wanted=False) for kernel in replica.kernels)

    def kernel(self, uid: str, **changes: object) -> None:
        replica = self.replicas[uid]
        self.replicas[uid] = replace(replica, kernels=(replace(replica.kernels[0], **changes),))

    def report(self, uid: str, health: KernelHealth) -> None:
        self.kernel(uid, phase=KernelPhase.RUNNING, health=health)

    def crash(self, uid: str, reason: str = "EXITED") -> None:
        self.kernel(uid, phase=KernelPhase.EXITED, exit=Exit(reason, 3, "exited with 3", "boom"))

    def all_healthy(self) -> None:
        self.run()
        for replica in self.living():
            if not replica.leaving:
                self.report(replica.uid, KernelHealth.HEALTHY)
        self.run()

    def stop_what_is_unwanted(self) -> None:
        for replica in list(self.replicas.values()):
            if replica.kernels and not replica.kernels[0].wanted:
                self.kernel(replica.uid, phase=KernelPhase.GONE)

    def of(self, revision: int) -> list[ReplicaView]:
        """Those of a revision that are not leaving."""
        return [r for r in self.living() if r.revision == revision and not r.leaving]

    def weights(self) -> dict[int, int]:
        return dict(traffic(self.endpoint, self.living()))

    def live(self, bad: frozenset[int] = frozenset()) -> None:
        """A while passes: what starts becomes healthy, what drains has drained, what was stopped is gone.

        Replicas of the revisions in `bad` exit instead of becoming healthy.
        """
        self.run()
        for replica in self.living():
            if replica.leaving or replica.kernels[0].phase in (KernelPhase.EXITED, KernelPhase.GONE):
                continue
            if replica.revision in bad and not replica.was_healthy:
                self.crash(replica.uid)
            else:
                self.report(replica.uid, KernelHealth.HEALTHY)
        self.drained = frozenset(replica.uid for replica in self.living() if replica.draining)
        self.run()
        self.stop_what_is_unwanted()
        self.run()
