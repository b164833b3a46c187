"""The table as it is served: routes with their balancers, waiting lines and meters.

Everything that the data plane keeps in memory hangs here. The stream changes it with `use`; requests look
up an endpoint, `lease` a replica and release it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dure.appproxy.admission import Refusal, TokenCheck, WaitingLine, refusal, unavailable
from dure.appproxy.balance import Balancer, NoReplica, Replica
from dure.appproxy.holding import HELD_PER_ENDPOINT, Full, Holding
from dure.appproxy.meter import EndpointMeter
from dure.appproxy.table import EMPTY, Route, Table
from dure.routing.v1 import routing_pb2 as pb

# How long a replica that refused connections is reported as unreachable.
UNREACHABLE_REPORT_S = 10.0
UNREACHABLE_REPORTED_MAX = 100
# No manager asks for longer; one that does is not believed.
HOLD_MAX_S = 600.0
_HOPELESS = frozenset((pb.UNAVAILABILITY_BLOCKED, pb.UNAVAILABILITY_STOPPED, pb.UNAVAILABILITY_TERMINATING))


@dataclass(frozen=True)
class Limits:
    """What one request, endpoint or replica may take."""

    queue_size: int = 1000
    held_requests: int = HELD_PER_ENDPOINT
    queue_wait_s: float = 30.0
    requests_per_replica: int = 1024
    first_byte_timeout_s: float = 600.0
    body_bytes_max: int = 1 << 30
    head_bytes_max: int = 64 * 1024


@dataclass(eq=False)
class Tries:
    """What a request has tried in vain: replicas by uid, and the pool of the last of them.

    `size_bytes` is what is kept of the request while it is held, `held_until_s` when that ends; `let_go`
    that it was held, and that those behind it wait for it to pass on.
    """

    replicas: set[str] = field(default_factory=set)
    pool: int | None = None
    size_bytes: int = 0
    held_until_s: float | None = None
    let_go: bool = False

    def add(self, replica: Replica) -> None:
        self.replicas.add(replica.target.replica_uid)
        self.pool = replica.target.revision


@dataclass(eq=False)
class Endpoint:
    """One endpoint that is in the table, or was when a request that is under way began.

    `holds` while it has no replica and its requests are to wait for one.
    """

    route: Route
    balancer: Balancer
    line: WaitingLine
    meter: EndpointMeter
    waiters: dict[int, tuple[asyncio.Future[Replica | None], Tries]] = field(default_factory=dict)
    holds: bool = False


class _AtZero(Exception):
    """There is no replica, and requests are to wait for one."""


class AllTried(Exception):
    """Every replica that serves has been tried by this request."""


class Refused(Exception):
    """The request ends with an answer of the proxy."""

    def __init__(self, answer: Refusal) -> None:
        super().__init__(answer.code)
        self.answer = answer


class Live:
    """The served table.

    `on_table` is called after each change of it, `on_gone` with replicas that get no more requests,
    `on_drained` when a draining one has none left.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.tokens = TokenCheck()
        self.table: Table = EMPTY
        self.endpoints: dict[str, Endpoint] = {}
        self.unmatched = 0
        self.active = 0
        self.holding = Holding(self.limits.held_requests)
        self.on_gone: list[Callable[[Replica], None]] = []
        self.on_table: list[Callable[[], None]] = []
        self.on_drained: list[Callable[[], None]] = []
        self._clock = clock
        self._unreachable: dict[str, float] = {}
        self._table_changed = asyncio.Event()

    def use(self, table: Table) -> None:
        """Switches to a new table, all at once."""
        self.table = table
        self.tokens.use_keys(table.keys)
        for uid in [uid for uid in self.endpoints if uid not in table.routes]:
            gone = self.endpoints.pop(uid)
            for replica in gone.balancer.update(()):
                self._gone(replica)
            gone.holds = False
            self._wake_all(gone)
            self.holding.free(uid)
        for uid, route in table.routes.items():
            endpoint = self.endpoints.get(uid)
            if endpoint is None:
                endpoint = self.endpoints[uid] = Endpoint(
                    route,
                    Balancer(self.limits.requests_per_replica),
                    WaitingLine(self.limits.queue_size),
                    EndpointMeter(route.project, route.endpoint),
                )
            elif endpoint.route == route:
                continue
            endpoint.route = route
            for replica in endpoint.balancer.update(route.targets, route.pools):
                self._gone(replica)
            endpoint.meter.keep_replicas({target.replica_uid for target in route.targets})
            endpoint.holds = (
                route.hold_ms > 0
                and route.unavailability not in _HOPELESS
                and not endpoint.balancer.serving()
            )
            self._hand_over(endpoint)
            if endpoint.holds:
                self.holding.keep(uid)
            else:
                self.holding.free(uid)
        changed, self._table_changed = self._table_changed, asyncio.Event()
        changed.set()
        for callback in self.on_table:
            callback()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when the table changes, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._table_changed.wait()
        except TimeoutError:
            return

    async def lease(self, endpoint: Endpoint, tried: Tries) -> Replica:
        """A replica with a place for one more request; `release` it. Waits in line if all are busy, and
        for a replica to start where the endpoint holds its requests.

        Raises Refused, or AllTried.
        """
        while True:
            if endpoint.holds:
                await self.hold(endpoint, tried)
            try:
                return await self._lease(endpoint, tried)
            except _AtZero:
                continue

    async def hold(self, endpoint: Endpoint, tried: Tries) -> None:
        """Waits as long as the endpoint holds its requests. Raises Refused.

        The time is one for the whole request, however often the endpoint goes to zero meanwhile.
        """
        loop = asyncio.get_running_loop()
        while endpoint.holds:
            hold_s = min(HOLD_MAX_S, endpoint.route.hold_ms / 1000)
            if tried.held_until_s is None:
                tried.held_until_s = loop.time() + hold_s
            endpoint.meter.held += 1
            try:
                async with asyncio.timeout_at(tried.held_until_s):
                    await self.holding.wait(endpoint.route.endpoint_uid, tried.size_bytes)
                tried.let_go = True
            except TimeoutError:
                if not endpoint.holds:
                    raise Refused(refusal("queue_timeout")) from None
                message = f"no replica has started within the {hold_s:g} s that this request has waited"
                raise Refused(refusal("starting", message)) from None
            except Full:
                raise Refused(refusal("hold_full")) from None
            finally:
                endpoint.meter.held -= 1
        if self.endpoints.get(endpoint.route.endpoint_uid) is not endpoint:
            raise Refused(refusal("no_such_endpoint"))

    def pass_on(self, endpoint: Endpoint, tried: Tries) -> None:
        """A request that was held has reached a replica, or ended."""
        tried.let_go = False
        self.holding.pass_on(endpoint.route.endpoint_uid)

    async def _lease(self, endpoint: Endpoint, tried: Tries) -> Replica:
        if not len(endpoint.line):
            picked = self._pick(endpoint, tried)
            if picked is not None:
                return picked
        elif not endpoint.balancer.serving():
            raise _AtZero if endpoint.holds else Refused(unavailable(endpoint.route))
        try:
            async with asyncio.timeout(self.limits.queue_wait_s):
                return await self._wait_in_line(endpoint, tried)
        except TimeoutError:
            raise Refused(refusal("queue_timeout")) from None

    def _pick(self, endpoint: Endpoint, tried: Tries) -> Replica | None:
        """A replica, acquired; None if all are busy. Raises Refused, AllTried, or _AtZero."""
        choice = endpoint.balancer.choose(self._clock(), tried.replicas, tried.pool)
        if isinstance(choice, Replica):
            endpoint.balancer.acquire(choice)
            return choice
        if choice is NoReplica.NONE_SERVING:
            if endpoint.holds:
                raise _AtZero
            raise Refused(unavailable(endpoint.route))
        if choice is NoReplica.ALL_TRIED:
            raise AllTried
        return None

    async def _wait_in_line(self, endpoint: Endpoint, tried: Tries) -> Replica:
        endpoint.meter.queued += 1
        try:
            while True:
                ticket = endpoint.line.join()
                if ticket is None:
                    raise Refused(refusal("queue_full"))
                replica = await self._wait_for_turn(endpoint, ticket, tried)
                if replica is None:
                    # Woken because there may be nothing to wait for: look again, and say why if so.
                    if self.endpoints.get(endpoint.route.endpoint_uid) is not endpoint:
                        raise Refused(refusal("no_such_endpoint"))
                    replica = self._pick(endpoint, tried)
                if replica is not None:
                    return replica
        finally:
            endpoint.meter.queued -= 1

    async def _wait_for_turn(self, endpoint: Endpoint, ticket: int, tried: Tries) -> Replica | None:
        waiter: asyncio.Future[Replica | None] = asyncio.get_running_loop().create_future()
        endpoint.waiters[ticket] = (waiter, tried)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Handed over in the very moment in which the client left: pass it on.
            if waiter.done() and not waiter.cancelled() and (given := waiter.result()) is not None:
                self.release(endpoint, given)
            raise
        finally:
            endpoint.waiters.pop(ticket, None)
            endpoint.line.leave(ticket)

    def release(self, endpoint: Endpoint, replica: Replica) -> None:
        endpoint.balancer.release(replica)
        if replica.target.draining and not replica.outstanding:
            for callback in self.on_drained:
                callback()
        self._hand_over(endpoint)

    def connect_failed(self, endpoint: Endpoint, replica: Replica) -> None:
        now_s, failures = self._clock(), replica.failures
        endpoint.balancer.connect_failed(replica, now_s)
        meter = endpoint.meter.replica(replica.target.replica_uid)
        meter.connect_failures += 1
        meter.ejections += replica.failures > failures
        address = f"{replica.target.host}:{replica.target.port}"
        self._unreachable.pop(address, None)
        self._unreachable[address] = now_s
        if len(self._unreachable) > UNREACHABLE_REPORTED_MAX:
            del self._unreachable[next(iter(self._unreachable))]

    def connected(self, endpoint: Endpoint, replica: Replica) -> None:
        endpoint.balancer.connected(replica)
        self._unreachable.pop(f"{replica.target.host}:{replica.target.port}", None)

    def unreachable(self) -> list[str]:
        """Targets that refused a connection lately and have accepted none since."""
        oldest_s = self._clock() - UNREACHABLE_REPORT_S
        self._unreachable = {address: at_s for address, at_s in self._unreachable.items() if at_s >= oldest_s}
        return list(self._unreachable)

    def drained(self) -> list[str]:
        """Draining targets that have no request left."""
        return [uid for endpoint in self.endpoints.values() for uid in endpoint.balancer.drained()]

    def _gone(self, replica: Replica) -> None:
        for callback in self.on_gone:
            callback(replica)

    def _hand_over(self, endpoint: Endpoint) -> None:
        """Gives free places to those who wait; wakes everybody when there is nothing to wait for."""
        while (ticket := endpoint.line.first()) is not None:
            waiter, tried = endpoint.waiters[ticket]
            try:
                replica = self._pick(endpoint, tried)
            except (Refused, AllTried, _AtZero):
                replica = None
            else:
                if replica is None:
                    return
            endpoint.line.leave(ticket)
            if waiter.done():
                if replica is not None:
                    endpoint.balancer.release(replica)
                continue
            waiter.set_result(replica)

    def _wake_all(self, endpoint: Endpoint) -> None:
        for ticket in endpoint.line.tickets():
            endpoint.line.leave(ticket)
            waiter, _ = endpoint.waiters[ticket]
            if not waiter.done():
                waiter.set_result(None)
