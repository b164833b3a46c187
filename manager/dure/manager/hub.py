"""The route table as it is now, and the proxies that follow it: in memory.

Routes are derived from the store, so a manager that starts builds them anew, as a table with an id of its
own: a proxy that comes with another one gets a snapshot. Proxies follow by waiting for
`changed` and asking `updates_after`, so that one that is slow gets fewer, larger updates, never a queue.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dure.manager.fleet import monotonic_ms
from dure.routing.v1 import routing_pb2

REMOVALS_KEPT = 10_000
# Routes in one piece of an update: a route with 100 targets has about 10 KB.
PIECE_BYTES = 256 * 1024
# A proxy that has not taken up a route for this long is not waited for any longer.
APPLY_WAIT_MS = 2_000
# Time after a manager's start within which not all proxies need to have come back.
START_MS = 20_000


@dataclass(eq=False)
class Proxy:
    """One stream of a proxy."""

    uid: str
    name: str
    group: str
    hello: routing_pb2.Hello
    applied: int = 0
    drained: set[str] = field(default_factory=set)
    bind_failures: dict[str, routing_pb2.BindFailure] = field(default_factory=dict)
    unreachable: tuple[str, ...] = ()
    replaced: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Entry:
    route: routing_pb2.Route
    revision: int
    since_ms: int


class Hub:
    """The table, and who has which revision of it."""

    def __init__(
        self,
        table_id: str,
        keys: list[routing_pb2.PublicKey],
        clock_ms: Callable[[], int] = monotonic_ms,
    ) -> None:
        self.table_id = table_id
        self._clock_ms = clock_ms
        self.keys = keys
        self.revision = 0
        self.proxies: dict[str, Proxy] = {}
        self._routes: dict[str, _Entry] = {}
        self._removed: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        self._changed = asyncio.Event()
        # When a proxy of a group was lost, by its uid; since when any proxy of a group has been there.
        self._closed_ms: dict[tuple[str, str], int] = {}
        self._watched_ms: dict[str, int] = {}

    def put(self, route: routing_pb2.Route) -> None:
        """Publishes a route if it differs from the one that is there."""
        entry = self._routes.get(route.endpoint_uid)
        if entry is not None and entry.route == route:
            return
        self.revision += 1
        self._removed.pop(route.endpoint_uid, None)
        self._routes[route.endpoint_uid] = _Entry(route, self.revision, self._clock_ms())
        self._wake()

    def remove(self, endpoint_uid: str) -> None:
        if self._routes.pop(endpoint_uid, None) is None:
            return
        self.revision += 1
        self._removed[endpoint_uid] = self.revision
        if len(self._removed) > REMOVALS_KEPT:
            _, self._floor = self._removed.popitem(last=False)
        self._wake()

    async def changed_after(self, revision: int) -> None:
        """Waits until the table is newer than `revision`."""
        while self.revision <= revision:
            await self._changed.wait()

    def updates_after(self, table_id: str, revision: int, group: str) -> list[routing_pb2.TableUpdate]:
        """What brings a table at `revision` up to date, in pieces; the last has complete = true."""
        snapshot = table_id != self.table_id or not self._floor <= revision <= self.revision
        pieces = [self._piece(snapshot)]
        size = 0
        for entry in self._routes.values():
            if snapshot or entry.revision > revision:
                size += entry.route.ByteSize()
                if size > PIECE_BYTES:
                    pieces.append(self._piece(snapshot))
                    size = entry.route.ByteSize()
                pieces[-1].routes.append(entry.route)
        if not snapshot:
            pieces[-1].removed.extend(uid for uid, at in self._removed.items() if at > revision)
        pieces[-1].complete = True
        pieces[-1].revision_number = self.revision
        pieces[-1].keys.extend(self.keys)
        pieces[-1].members.extend(self.members(group))
        return pieces

    def _piece(self, snapshot: bool) -> routing_pb2.TableUpdate:
        return routing_pb2.TableUpdate(table_id=self.table_id, snapshot=snapshot)

    def opened(self, proxy: Proxy) -> None:
        before = self.proxies.get(proxy.uid)
        if before is not None:
            before.replaced.set()
        self.proxies[proxy.uid] = proxy
        self._closed_ms.pop((proxy.group, proxy.uid), None)
        self._watched_ms.setdefault(proxy.group, self._clock_ms())
        self._members_changed()

    def closed(self, proxy: Proxy) -> None:
        if self.proxies.get(proxy.uid) is proxy:
            del self.proxies[proxy.uid]
            self._closed_ms[proxy.group, proxy.uid] = self._clock_ms()
            if not any(other.group == proxy.group for other in self.proxies.values()):
                self._watched_ms.pop(proxy.group, None)
            self._members_changed()

    def members(self, group: str) -> list[str]:
        """Names of the connected proxies of a group."""
        return sorted(proxy.name for proxy in self.proxies.values() if proxy.group == group)

    def watched_since_ms(self, group: str) -> int | None:
        """Since when (monotonic) there has always been a proxy of a group; None if there is none."""
        return self._watched_ms.get(group)

    def away(self, group: str, *, max_ms: int, started_ms: int) -> bool:
        """Whether a proxy of a group may still see traffic that nobody hears of: one was lost lately, or this
        manager has just started and not all may have come yet."""
        now = self._clock_ms()
        self._closed_ms = {key: at for key, at in self._closed_ms.items() if now - at < max_ms}
        return now - started_ms < START_MS or any(key[0] == group for key in self._closed_ms)

    def _members_changed(self) -> None:
        """Every proxy is told who else there is, with the next update."""
        self.revision += 1
        self._wake()

    def published(self, route: routing_pb2.Route, group: str) -> bool:
        """Whether every connected proxy of a group goes by this very route.

        One that has not taken it up for APPLY_WAIT_MS is not waited for.
        """
        members = [proxy for proxy in self.proxies.values() if proxy.group == group]
        entry = self._routes.get(route.endpoint_uid)
        if entry is None or entry.route != route:
            return not members
        late = self._clock_ms() - entry.since_ms > APPLY_WAIT_MS
        return late or all(proxy.applied >= entry.revision for proxy in members)

    def drained(self, group: str) -> frozenset[str]:
        """Draining replicas that every connected proxy of a group has let go; none without a proxy,
        since one that is away may still serve."""
        members = [proxy.drained for proxy in self.proxies.values() if proxy.group == group]
        return frozenset(set.intersection(*members)) if members else frozenset()

    def bind_failures(self, endpoint_uid: str) -> list[tuple[str, routing_pb2.BindFailure]]:
        """By proxy name."""
        return sorted(
            (
                (proxy.name, proxy.bind_failures[endpoint_uid])
                for proxy in self.proxies.values()
                if endpoint_uid in proxy.bind_failures
            ),
            key=lambda item: item[0],
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
