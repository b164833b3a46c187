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


@dataclass(frozen=True)
class Exit:
    """How a kernel ended; `reason` as in the agents' protocol."""

    reason: str
    code: int
    message: str
    log_tail: str = ""


@dataclass(frozen=True)
class KernelView:
    """A kernel, as far as its replica's fate depends on it."""

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


@dataclass(frozen=True)
class EndpointView:
    """An endpoint, as far as its replicas' fate depends on it."""

    uid: str
    name: str
    desired: int
    revision: int
    deleting: bool = False
    blocked: bool = False
    errors: tuple[str, ...] = ()
    failures: int = 0
    failed_ms: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What else a decision about an endpoint looks at.

    `lost_ms` has how long each agent that is not heard of has been away; `given_up` those that are not
    waited for any longer; `drained` replicas that every connected proxy has let go;
    `published` whether every connected proxy has the newest route; `lingering` counts kernels of ended
    replicas that their agents have yet to stop.
    """

    now_ms: int
    lost_ms: Mapping[str, int] = field(default_factory=dict)
    given_up: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    published: bool = True
    lingering: int = 0
