"""What the reconciler decides, as a value: moves of replicas from status to status, and what else to do.

A replica's life, and the only moves that there are:

    PENDING ──placed──> STARTING ──command runs──> DEGRADED ──probe──> HEALTHY <──> UNHEALTHY
       any of them ──not wanted──> TERMINATING ──gone──> TERMINATED
       any of them ──ended by itself──> FAILED
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dure.manager.model import EndpointStatus, ReplicaStatus, RolloutState

S = ReplicaStatus

MOVES: dict[ReplicaStatus, frozenset[ReplicaStatus]] = {
    S.PENDING: frozenset({S.STARTING, S.TERMINATING, S.TERMINATED, S.FAILED}),
    S.STARTING: frozenset({S.DEGRADED, S.HEALTHY, S.UNHEALTHY, S.TERMINATING, S.FAILED}),
    S.DEGRADED: frozenset({S.HEALTHY, S.UNHEALTHY, S.TERMINATING, S.FAILED}),
    S.HEALTHY: frozenset({S.UNHEALTHY, S.TERMINATING, S.FAILED}),
    S.UNHEALTHY: frozenset({S.HEALTHY, S.TERMINATING, S.FAILED}),
    S.TERMINATING: frozenset({S.TERMINATED}),
    S.TERMINATED: frozenset(),
    S.FAILED: frozenset(),
}

BACKOFF_FIRST_MS, BACKOFF_MAX_MS = 1_000, 60_000


class IllegalMove(Exception):
    """A bug: a status that cannot follow another."""


@dataclass(frozen=True)
class Move:
    """A replica changes its status; `stop` ends its kernels, `drain` takes it out of the route first."""

    uid: str
    status: ReplicaStatus
    reason: str
    event: str = ""
    warning: bool = False
    stop: bool = False
    drain: bool = False


@dataclass
class Plan:
    """What to do. `create` counts new replicas by revision; `rollback` says why the wanted revision is given
    up for the stable one; `stable` is what is now the stable one; `look_again_ms` is when the clock alone may
    change the decision.
    """

    create: dict[int, int] = field(default_factory=dict)
    rollout: RolloutState | None = None
    rollback: str = ""
    stable: int = 0
    moves: list[Move] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    clear_errors: bool = False
    failures: int = 0
    failed_ms: int = 0
    evictions: int = 0
    evicted_ms: int = 0
    last_error: str = ""
    blocked: bool = False
    status: EndpointStatus = EndpointStatus.PENDING
    reason: str = ""
    gone: bool = False
    look_again_ms: int | None = None

    def look_at(self, at_ms: int) -> None:
        if self.look_again_ms is None or at_ms < self.look_again_ms:
            self.look_again_ms = at_ms

    @property
    def next_start_ms(self) -> int:
        """Before it nothing is started; 0 after no failure."""
        after_failure_ms = self.failed_ms + backoff_ms(self.failures) if self.failures else 0
        after_eviction_ms = self.evicted_ms + backoff_ms(self.evictions) if self.evictions else 0
        return max(after_failure_ms, after_eviction_ms)


def backoff_ms(failures: int) -> int:
    """Pause before the next start after so many failures in a row."""
    if failures == 0:
        return 0
    return int(min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** min(failures - 1, 10)))
