"""RoutingService: proxies join, follow the route table, and report."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
from sqlalchemy import select

from dure.manager import auth, schema, streams
from dure.manager.controller import Controller
from dure.manager.hub import Hub, Proxy
from dure.manager.joining import join
from dure.manager.measures import Measures
from dure.manager.store import Store, now_ms
from dure.routing.v1 import routing_pb2, routing_pb2_grpc
from dure.wire import errors
from dure.wire.errors import Violation

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Proxies report every two seconds.
SILENCE_S = 15.0
MEASUREMENTS_MAX, HELD_MAX = 1_000, 10_000
UNAVAILABLE_PORTS_MAX, DRAINED_MAX, UNREACHABLE_MAX = 65_535, 100_000, 100


class RoutingApi(routing_pb2_grpc.RoutingServiceServicer):
    """What proxies call."""

    def __init__(self, store: Store, hub: Hub, controller: Controller, measures: Measures) -> None:
        self._store = store
        self._measures = measures
        self._hub = hub
        self._controller = controller

    async def Join(self, request: routing_pb2.JoinRequest, context: Context) -> routing_pb2.JoinResponse:
        uid, credential = await join(
            self._store, "proxy", request.proxy, lambda uid: uid in self._hub.proxies
        )
        return routing_pb2.JoinResponse(uid=uid, credential=credential)

    async def Connect(self, _requests: Any, context: Context) -> None:  # type: ignore[override]
        principal = auth.current()
        hello = _checked(await streams.read_hello(context, "a proxy"))
        await self._store_hello(principal.uid, hello)
        proxy = Proxy(principal.uid, principal.name, hello.proxy_group, hello)
        self._hub.opened(proxy)
        log.info("proxy %s connected from %s", proxy.name, context.peer())
        sending = asyncio.Lock()
        try:
            await streams.serve(
                "proxy",
                proxy.replaced,
                self._listen(proxy, context, sending),
                self._tell(proxy, context, sending),
            )
        finally:
            self._hub.closed(proxy)
            self._measures.close_proxy(proxy.uid)
            self._controller.proxies_moved()
            log.info("proxy %s disconnected", proxy.name)

    async def _store_hello(self, uid: str, hello: routing_pb2.Hello) -> None:
        """Raises FailedPrecondition if a connected proxy of the group offers something else."""
        for other in self._hub.proxies.values():
            if other.uid != uid and other.group == hello.proxy_group and _offer(other.hello) != _offer(hello):
                raise errors.FailedPrecondition(
                    f"proxy {other.name} of group `{hello.proxy_group}` offers {_offer(other.hello)}, this "
                    f"one {_offer(hello)}; the members of a group must offer the same addresses",
                    reason="PROXY_GROUP_MISMATCH",
                )
        async with self._store.write() as tx:
            row = await tx.session.scalar(select(schema.Proxy).where(schema.Proxy.uid == uid))
            assert row is not None, "authenticated above, and proxies are never removed"
            # What the proxy has of the table changes with every connection and says nothing about it.
            kept = routing_pb2.Hello()
            kept.CopyFrom(hello)
            kept.ClearField("table_id")
            kept.ClearField("revision_number")
            stored = kept.SerializeToString(deterministic=True)
            row.hello_ms = now_ms()
            if row.hello != stored:
                row.hello, row.proxy_group = stored, hello.proxy_group
                tx.touch("proxy", uid)

    async def _listen(self, proxy: Proxy, context: Context, sending: asyncio.Lock) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    message = await context.read()
            except TimeoutError as error:
                raise errors.TimedOut("this proxy has sent no report for too long") from error
            if message is grpc.aio.EOF:
                return
            if not message.HasField("report"):
                raise errors.InvalidInput("after its hello a proxy sends reports")
            report = message.report
            drained = set(report.drained[:DRAINED_MAX])
            failures = {failure.endpoint_uid: failure for failure in report.bind_failures}
            moved = report.applied_revision_number != proxy.applied or drained != proxy.drained
            changed = {
                uid
                for uid in failures.keys() | proxy.bind_failures.keys()
                if failures.get(uid) != proxy.bind_failures.get(uid)
            }
            proxy.applied, proxy.drained = report.applied_revision_number, drained
            proxy.bind_failures = failures
            proxy.unreachable = tuple(report.unreachable_targets[:UNREACHABLE_MAX])
            self._measures.proxy(proxy.uid, report.measurements[:MEASUREMENTS_MAX])
            for uid in report.held[:HELD_MAX]:
                self._measures.held(uid)
            for uid in changed:
                self._controller.wake(uid)
            if moved:
                self._controller.proxies_moved()
            await streams.send(context, sending, routing_pb2.ConnectResponse(pong=routing_pb2.Pong()))

    async def _tell(self, proxy: Proxy, context: Context, sending: asyncio.Lock) -> None:
        table_id, revision = proxy.hello.table_id, proxy.hello.revision_number
        while True:
            pieces = self._hub.updates_after(table_id, revision, proxy.group)
            for piece in pieces:
                await streams.send(context, sending, routing_pb2.ConnectResponse(update=piece))
            table_id, revision = self._hub.table_id, pieces[-1].revision_number
            await self._hub.changed_after(revision)


def _checked(hello: routing_pb2.Hello) -> routing_pb2.Hello:
    violations = []
    hello.proxy_group = hello.proxy_group or "default"
    if hello.protocol_version < 1:
        violations.append(Violation("protocol_version", "must be at least 1; this manager speaks 1"))
    if hello.HasField("port_pool"):
        pool = hello.port_pool
        if not 1 <= pool.first <= pool.last <= 65_535:
            violations.append(Violation("port_pool", f"{pool.first}-{pool.last} is not a range of ports"))
        if not hello.public_host:
            violations.append(Violation("public_host", "is required in port mode"))
    elif not hello.HasField("subdomains") or not hello.subdomains.domain:
        violations.append(Violation("addressing", "is required: port_pool, or subdomains with a domain"))
    if violations:
        raise errors.InvalidInput.of(violations)
    del hello.unavailable_ports[UNAVAILABLE_PORTS_MAX:]
    return hello


def _offer(hello: routing_pb2.Hello) -> str:
    """What a group's members must have in common, for people."""
    scheme = "https" if hello.https else "http"
    if hello.HasField("subdomains"):
        return f"{scheme}://*.{hello.subdomains.domain}:{hello.subdomains.port}"
    return f"{scheme}://{hello.public_host}:{hello.port_pool.first}-{hello.port_pool.last}"
