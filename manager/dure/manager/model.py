"""The values that decisions are made of: what is stored, as plain data.

All amounts are integer milli-units, all times integer milliseconds of the manager's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ReplicaStatus(StrEnum):
    PENDING = "PENDING"
    STARTING = "STARTING"
    DEGRADED = "DEGRADED"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"
    FAILED = "FAILED"


ENDED = frozenset({ReplicaStatus.TERMINATED, ReplicaStatus.FAILED})


class EndpointStatus(StrEnum):
    TERMINATING = "TERMINATING"
    BLOCKED = "BLOCKED"
    STOPPED = "STOPPED"
    IDLE = "IDLE"
    UPDATING = "UPDATING"
    PENDING = "PENDING"
    UNHEALTHY = "UNHEALTHY"
    DEGRADED = "DEGRADED"
    HEALTHY = "HEALTHY"


class KernelPhase(StrEnum):
    """As the agent reports it; ASSIGNED before its first report."""

    ASSIGNED = "ASSIGNED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    EXITED = "EXITED"
    GONE = "GONE"


class KernelHealth(StrEnum):
    UNKNOWN = "UNKNOWN"
    DEGRADED = "DEGRADED"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"


class AgentStatus(StrEnum):
    ALIVE = "ALIVE"
    LOST = "LOST"
    AWAITED = "AWAITED"


@dataclass(frozen=True)
class DeviceShare:
    """A part of a device."""

    device: str
    slot: str
    amount: int


@dataclass(frozen=True)
class Grant:
    """What a kernel holds of its agent, until it is GONE."""

    agent_uid: str
    slots: Mapping[str, int]
    devices: tuple[DeviceShare, ...] = ()
    fixed_port: int = 0
    rendezvous_port: int = 0


@dataclass(frozen=True)
class Exit:
    """How a kernel ended; `reason` as in the agents' protocol."""

    reason: str
    code: int
    message: str
    log_tail: str = ""


@dataclass(frozen=True)
class KernelView:
    """A kernel, as far as its replica's fate depends on it. `name` is its host name in the session."""

    uid: str
    agent_uid: str
    agent_name: str
    phase: KernelPhase
    health: KernelHealth
    wanted: bool
    host: str = ""
    port: int = 0
    message: str = ""
    exit: Exit | None = None
    name: str = "main1"


@dataclass(frozen=True)
class ReplicaView:
    """A replica with its kernels, main1 first; `since_ms` is when its status last changed."""

    uid: str
    revision: int
    status: ReplicaStatus
    created_ms: int
    since_ms: int
    kernels: tuple[KernelView, ...] = ()
    was_healthy: bool = False
    healthy_since_ms: int = 0
    draining: bool = False
    reason: str = ""

    @property
    def living(self) -> bool:
        return self.status not in ENDED

    @property
    def leaving(self) -> bool:
        return self.status is ReplicaStatus.TERMINATING or not self.living


class Strategy(StrEnum):
    ROLLING = "ROLLING"
    BLUE_GREEN = "BLUE_GREEN"
    CANARY = "CANARY"


@dataclass(frozen=True)
class CanaryStep:
    """`weight` is the percent of requests; without `hold_ms` the step lasts until it is resumed."""

    weight: int
    hold_ms: int | None = None


@dataclass(frozen=True)
class RolloutPolicy:
    """How a revision takes the place of another. Amounts are numbers or percentages of the wanted number."""

    strategy: Strategy = Strategy.ROLLING
    max_surge: str = "1"
    max_unavailable: str = "0"
    deadline_ms: int = 600_000
    steps: tuple[CanaryStep, ...] = (CanaryStep(10),)
    manual_switch: bool = False
    automatic_rollback: bool = True


@dataclass(frozen=True)
class RolloutState:
    """Where the rollout of `revision` stands.

    `most_serving` is the most new replicas that ever served, at `progress_ms`. `step` counts canary steps
    from 0 (blue-green: 1 once it is switched); `met_ms` is since when its replicas serve, 0 if they do not
    yet. `full` skips what is left of the steps. `failures` counts starts of the new revision that failed, the
    last at `failed_ms`.
    """

    revision: int
    progress_ms: int
    most_serving: int = 0
    step: int = 0
    met_ms: int = 0
    full: bool = False
    paused: bool = False
    failures: int = 0
    failed_ms: int = 0
    reason: str = ""


@dataclass(frozen=True)
class EndpointView:
    """An endpoint, as far as its replicas' fate depends on it.

    `stable` is the newest revision of which all replicas were healthy, 0 for none. `idle` says that the
    autoscaler, not the user, wants zero replicas, or has just been woken. `failures` in a row, the last at
    `failed_ms`; `evictions` of them by nodes, which being healthy for a moment does not end; `last_error` is
    why the last of either ended.
    """

    uid: str
    name: str
    desired: int
    revision: int
    stable: int = 0
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    rollout: RolloutState | None = None
    deleting: bool = False
    blocked: bool = False
    errors: tuple[str, ...] = ()
    failures: int = 0
    failed_ms: int = 0
    evictions: int = 0
    evicted_ms: int = 0
    last_error: str = ""
    idle: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What else a decision about an endpoint looks at.

    `lost_ms` has how long each agent that is not heard of has been away; `given_up` those that are not
    waited for any longer; `emptying` those that shall be left; `drained` replicas that every connected proxy
    has let go;
    `published` whether every connected proxy has the newest route; `lingering` counts kernels of ended
    replicas that their agents have yet to stop.
    """

    now_ms: int
    lost_ms: Mapping[str, int] = field(default_factory=dict)
    given_up: frozenset[str] = frozenset()
    emptying: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    published: bool = True
    lingering: int = 0
