"""Which replica gets a request: the least loaded one, by weight, that accepts connections.

A replica that refuses connections is ejected for a bounded time, doubling with each failure in a row;
when that is over, one request at a time may try it. Were all ejected, the one that is due first is used:
a proxy that is wrong about every replica must not refuse everybody.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dure.appproxy.table import Target

EJECTION_FIRST_S = 1.0
EJECTION_MAX_S = 10.0


class NoReplica(enum.Enum):
    """Why `choose` has none."""

    NONE_SERVING = enum.auto()
    ALL_TRIED = enum.auto()
    ALL_BUSY = enum.auto()


@dataclass(eq=False, slots=True)
class Replica:
    """A target and what this proxy knows about it."""

    target: Target
    outstanding: int = 0
    failures: int = 0
    ejected_until_s: float = 0.0
    on_trial: bool = False

    def ejected(self, now_s: float) -> bool:
        """Whether it is kept out; after its time one request at once may try it."""
        return self.failures > 0 and (now_s < self.ejected_until_s or self.on_trial)


class Balancer:
    """The replicas of one endpoint."""

    def __init__(self, requests_per_replica: int) -> None:
        self._requests_per_replica = requests_per_replica
        self._replicas: dict[str, Replica] = {}

    @property
    def replicas(self) -> Collection[Replica]:
        return self._replicas.values()

    def update(self, targets: Iterable[Target]) -> list[Replica]:
        """Takes over the targets of a new table; returns the replicas that left it or no longer serve."""
        old, self._replicas = self._replicas, {}
        for target in targets:
            replica = old.get(target.replica_uid)
            if replica is None or (replica.target.host, replica.target.port) != (target.host, target.port):
                replica = Replica(target)
            replica.target = target
            self._replicas[target.replica_uid] = replica
        kept = {id(replica) for replica in self._replicas.values() if not replica.target.draining}
        return [replica for replica in old.values() if id(replica) not in kept]

    def serving(self) -> bool:
        return any(not replica.target.draining for replica in self._replicas.values())

    def choose(self, now_s: float, tie: int, tried: Collection[str] = ()) -> Replica | NoReplica:
        """The replica for a request that has tried those of uid `tried`; `acquire` it at once.

        `tie` decides among equals, by its remainder.
        """
        serving = [replica for replica in self._replicas.values() if not replica.target.draining]
        if not serving:
            return NoReplica.NONE_SERVING
        untried = [replica for replica in serving if replica.target.replica_uid not in tried]
        if not untried:
            return NoReplica.ALL_TRIED
        usable = [replica for replica in untried if not replica.ejected(now_s)]
        if not usable:
            usable = [min(untried, key=lambda replica: replica.ejected_until_s)]
        free = [replica for replica in usable if replica.outstanding < self._requests_per_replica]
        if not free:
            return NoReplica.ALL_BUSY
        if len(free) == 1:
            return free[0]
        load = min((r.outstanding + 1) / r.target.weight for r in free)
        least = [r for r in free if (r.outstanding + 1) / r.target.weight == load]
        return least[tie % len(least)]

    def acquire(self, replica: Replica) -> None:
        replica.outstanding += 1
        replica.on_trial = replica.failures > 0

    def release(self, replica: Replica) -> None:
        if replica.outstanding <= 0:
            raise ValueError(f"replica {replica.target.replica_uid} was released more often than acquired")
        replica.outstanding -= 1
        replica.on_trial = False

    def connected(self, replica: Replica) -> None:
        replica.failures = 0
        replica.on_trial = False
        replica.ejected_until_s = 0.0

    def connect_failed(self, replica: Replica, now_s: float) -> None:
        """Ejects it. Failures of requests that were under way together count as one."""
        if replica.failures and now_s < replica.ejected_until_s:
            return
        replica.failures += 1
        duration_s = min(EJECTION_MAX_S, EJECTION_FIRST_S * 2.0 ** min(replica.failures - 1, 30))
        replica.ejected_until_s = now_s + duration_s

    def drained(self) -> list[str]:
        """Uids of draining targets that have no request left."""
        draining = (r for r in self._replicas.values() if r.target.draining)
        return [replica.target.replica_uid for replica in draining if not replica.outstanding]
