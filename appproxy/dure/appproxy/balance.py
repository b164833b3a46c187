"""Which replica gets a request: the next pool by weight, and in it the least loaded one that accepts
connections.

A replica that refuses connections is ejected for a bounded time, doubling with each failure in a row;
when that is over, one request at a time may try it. Were all ejected, the one that is due first is used:
a proxy that is wrong about every replica must not refuse everybody.

A pool is the replicas of one revision; without pools all replicas are one. A pool in which nobody can take
a request passes its turn on. Pools of weight 0, and replicas of no pool, are the reserve: they get what no
pool of weight has a replica for, but not what merely has to wait for one.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dure.appproxy.rounds import Rounds
from dure.appproxy.table import Target, TrafficPool

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


@dataclass(eq=False, slots=True)
class _Pool:
    """The replicas that share a turn. `turn` goes round those that are equally loaded."""

    serving: list[Replica]
    turn: int = 0

    def usable(self, now_s: float, tried: Collection[str]) -> list[Replica]:
        return [r for r in self.serving if not r.ejected(now_s) and r.target.replica_uid not in tried]

    def least(self, free: list[Replica]) -> Replica:
        if len(free) == 1:
            return free[0]
        load = min((r.outstanding + 1) / r.target.weight for r in free)
        least = [r for r in free if (r.outstanding + 1) / r.target.weight == load]
        self.turn += 1
        return least[(self.turn - 1) % len(least)]


class Balancer:
    """The replicas of one endpoint."""

    def __init__(self, requests_per_replica: int) -> None:
        self._requests_per_replica = requests_per_replica
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[int, _Pool] = {}
        self._reserve = _Pool([])
        self._rounds = Rounds({})

    @property
    def replicas(self) -> Collection[Replica]:
        return self._replicas.values()

    def update(self, targets: Iterable[Target], pools: Collection[TrafficPool] = ()) -> list[Replica]:
        """Takes over the targets of a new table; returns the replicas that left it or no longer serve.

        Turns go on where they stopped for all pools that stay.
        """
        old, self._replicas = self._replicas, {}
        for target in targets:
            replica = old.get(target.replica_uid)
            if replica is None or (replica.target.host, replica.target.port) != (target.host, target.port):
                replica = Replica(target)
            replica.target = target
            self._replicas[target.replica_uid] = replica
        self._split(pools)
        kept = {id(replica) for replica in self._replicas.values() if not replica.target.draining}
        return [replica for replica in old.values() if id(replica) not in kept]

    def _split(self, pools: Collection[TrafficPool]) -> None:
        serving = [replica for replica in self._replicas.values() if not replica.target.draining]
        weights = {pool.revision: pool.weight for pool in pools if pool.weight}
        before, self._pools = self._pools, {}
        if not pools:
            self._pools[0] = _Pool(serving, before[0].turn if 0 in before else 0)
            self._reserve.serving = []
        else:
            for revision in sorted(weights):
                turn = before[revision].turn if revision in before else 0
                self._pools[revision] = _Pool([r for r in serving if r.target.revision == revision], turn)
            self._reserve.serving = [r for r in serving if r.target.revision not in weights]
        self._rounds.reweigh(weights)

    def serving(self) -> bool:
        return any(not replica.target.draining for replica in self._replicas.values())

    def choose(
        self, now_s: float, tried: Collection[str] = (), pool: int | None = None
    ) -> Replica | NoReplica:
        """The replica for a request that has tried those of uid `tried`, the last of them in `pool`.

        It is its pool's turn then, so `acquire` it at once. A request that tries again stays in its pool as
        long as somebody there can take it.
        """
        free: dict[int, list[Replica]] = {}
        busy = False
        for revision, members in self._pools.items():
            usable = members.usable(now_s, tried)
            not_full = [r for r in usable if r.outstanding < self._requests_per_replica]
            if not_full:
                free[revision] = not_full
            busy = busy or bool(usable)
        if free:
            chosen = pool if pool is not None and pool in free else self._rounds.next(free)
            return self._pools[chosen].least(free[chosen])
        if busy:
            return NoReplica.ALL_BUSY
        return self._choose_in_need(now_s, tried)

    def _choose_in_need(self, now_s: float, tried: Collection[str]) -> Replica | NoReplica:
        """No pool of weight has a replica for it: somebody of the reserve, or one that is ejected."""
        usable = self._reserve.usable(now_s, tried)
        if not usable:
            pooled = [replica for members in self._pools.values() for replica in members.serving]
            for group in (pooled, self._reserve.serving):
                untried = [replica for replica in group if replica.target.replica_uid not in tried]
                if untried:
                    usable = [min(untried, key=lambda replica: replica.ejected_until_s)]
                    break
            else:
                return NoReplica.ALL_TRIED if self.serving() else NoReplica.NONE_SERVING
        free = [replica for replica in usable if replica.outstanding < self._requests_per_replica]
        return self._reserve.least(free) if free else NoReplica.ALL_BUSY

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
