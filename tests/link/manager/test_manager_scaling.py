"""Rules in a real manager, fed by a proxy that reports what the test wants it to have seen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from link.manager.inside import Inside, model_folder, until, with_inside

from dure.client import Client
from dure.routing.v1 import routing_pb2, routing_pb2_grpc
from dure.v1 import admin_pb2, endpoint_pb2
from dure.wire.channel import bearer, open_channel
from dure.wire.errors import InvalidInput, ResourceExhausted

BOUNDS = [10.0, 100.0, 1000.0]


class Proxy:
    """A proxy's stream: reports on demand, and the newest route of each endpoint."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.routes: dict[str, routing_pb2.Route] = {}
        self.members: list[str] = []
        self._applied = 0

    async def listen(self) -> None:
        async for message in self._stream:
            update = message.update
            for route in update.routes:
                self.routes[route.endpoint_uid] = route
            if update.complete:
                self._applied = update.revision_number
                self.members = list(update.members)
                await self.report()

    async def report(self, *measured: routing_pb2.EndpointMeasurement, held: tuple[str, ...] = ()) -> None:
        report = routing_pb2.Report(applied_revision_number=self._applied, measurements=measured, held=held)
        await self._stream.write(routing_pb2.ConnectRequest(report=report))


def measured(uid: str, **fields: Any) -> routing_pb2.EndpointMeasurement:
    answered = fields.pop("answered", 0)
    message = routing_pb2.EndpointMeasurement(
        endpoint_uid=uid, span_ms=1000, arrived=answered, latency_bounds_ms=BOUNDS, **fields
    )
    if answered:
        message.answered[2] = answered
    return message


@contextlib.asynccontextmanager
async def proxy(running: Inside, client: Client, name: str = "p1") -> AsyncIterator[Proxy]:
    token = (await client.admin.create_join_token(admin_pb2.JOIN_ROLE_PROXY)).token
    async with open_channel(running.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        joined = await stub.Join(routing_pb2.JoinRequest(proxy=name), metadata=bearer(token))
        stream = stub.Connect(metadata=bearer(joined.credential))
        hello = routing_pb2.Hello(
            protocol_version=1,
            public_host="127.0.0.1",
            port_pool=routing_pb2.PortPool(first=30100, last=30120),
        )
        await stream.write(routing_pb2.ConnectRequest(hello=hello))
        found = Proxy(stream)
        listening = asyncio.create_task(found.listen())
        try:
            yield found
        finally:
            stream.cancel()
            listening.cancel()
            await asyncio.wait([listening])


async def desired(client: Client, name: str) -> int:
    return (await client.endpoints.get(name)).desired_replicas


def with_proxy(tmp_path: Path, body: Callable[[Inside, Client, Proxy], Any]) -> None:
    async def run(running: Inside, client: Client) -> None:
        await model_folder(client, tmp_path / "folder")
        async with proxy(running, client) as found:
            await body(running, client, found)

    with_inside(tmp_path / "manager", run, timeout_s=90)


def test_a_rule_fires_and_explains_itself(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client, seen: Proxy) -> None:
        uid = (await client.endpoints.create("e", model="m", replicas=1)).uid
        kept = await client.rules.add(
            "e", "busy", source="proxy", metric="concurrency", above=8, step=2, max_replicas=5, cooldown=1
        )
        assert kept.warnings == ()

        async def grown(count: int) -> bool:
            await seen.report(measured(uid, answered=50, concurrency=20))
            return await desired(client, "e") == count

        await until(lambda: grown(3))
        await until(lambda: grown(5))
        await asyncio.sleep(1.5)
        await until(lambda: grown(5))
        found = await client.rules.explain("e")
        assert [(d.from_replicas, d.to_replicas, d.cause) for d in found.decisions] == [
            (3, 5, "busy"),
            (1, 3, "busy"),
        ]
        assert found.decisions[1].reason.startswith("concurrency is 20, > 8: 1 -> 3")
        assert "out of its bounds" in found.newest.verdicts[0].reason
        assert "5 replica(s) now (1 asked for)" in found.summary
        assert {metric.name for metric in found.metrics} >= {"requests_per_second", "concurrency", "queue"}
        events = [event.reason async for event in client.endpoints.events("e")]
        assert events.count("ENDPOINT_SCALED") == 2
        shown = await client.endpoints.get("e")
        assert (shown.replica_count, shown.desired_replicas) == (1, 5)
        # What the user says resets it, but only if it says another number.
        await client.endpoints.update("e", priority=20)
        assert await desired(client, "e") == 5
        await client.endpoints.update("e", replicas=2)
        assert await desired(client, "e") == 2

    with_proxy(tmp_path, body)


def test_requests_wake_what_is_idle_and_nothing_wakes_what_is_stopped(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client, seen: Proxy) -> None:
        uid = (
            await client.endpoints.create(
                "e", model="m", replicas=0, scale_to_zero_after=timedelta(seconds=60)
            )
        ).uid
        await until(lambda: _status(client, "IDLE"))
        await until(lambda: _true(uid in seen.routes))
        assert seen.routes[uid].unavailability == routing_pb2.UNAVAILABILITY_IDLE
        assert seen.routes[uid].hold_ms > 0
        await seen.report(held=(uid,))
        await until(lambda: _desired(client, 1))
        await until(lambda: _true(seen.routes[uid].unavailability == routing_pb2.UNAVAILABILITY_STARTING))
        assert seen.routes[uid].hold_ms > 0, "they wait until it is up"
        (decision,) = (await client.rules.explain("e")).decisions
        assert (decision.cause, decision.from_replicas, decision.to_replicas) == ("request", 0, 1)
        await client.endpoints.update("e", replicas=1)
        await client.endpoints.update("e", replicas=0)
        await until(lambda: _status(client, "STOPPED"))
        await until(lambda: _true(seen.routes[uid].hold_ms == 0))
        await seen.report(held=(uid,))
        await asyncio.sleep(1.5)
        assert await desired(client, "e") == 0

    async def _status(client: Client, status: str) -> bool:
        found = (await client.endpoints.get("e")).status
        return endpoint_pb2.EndpointStatus.Name(found) == f"ENDPOINT_STATUS_{status}"

    async def _desired(client: Client, count: int) -> bool:
        return await desired(client, "e") == count

    async def _true(value: bool) -> bool:
        return value

    with_proxy(tmp_path, body)


def test_a_quota_stops_the_autoscaler_with_the_reason(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client, seen: Proxy) -> None:
        await client.projects.update("default", quota_slots={"cpu": "2"})
        uid = (await client.endpoints.create("e", model="m", replicas=1, resource_slots={"cpu": "1"})).uid
        await client.rules.add("e", source="proxy", metric="queue", at_least=1, step=1, cooldown=0)

        async def stopped() -> bool:
            await seen.report(measured(uid, queue=30))
            found = await client.rules.explain("e")
            return "over the quota" in found.newest.reason

        await until(stopped)
        assert await desired(client, "e") == 2
        with pytest.raises(ResourceExhausted):
            await client.endpoints.create("f", model="m", replicas=1, resource_slots={"cpu": "1"})

    with_proxy(tmp_path, body)


def test_all_that_is_wrong_with_a_rule_is_told_at_once(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client, seen: Proxy) -> None:
        await client.endpoints.create("e", model="m", replicas=0)
        with pytest.raises(InvalidInput) as raised:
            await client.rules.add(
                "e", "Bad Name", source="kernel", metric="cpu", step=0, min_replicas=5, max_replicas=2
            )
        told = {violation.field for violation in raised.value.violations}
        assert told == {
            "rule_id",
            "rule.metric_name",
            "rule.comparator",
            "rule.threshold",
            "rule.step_size",
            "rule.min_replicas",
        }
        kept = await client.rules.add(
            "e", source="inference-framework", metric="vllm:num_requests_waiting", above=1
        )
        assert "no replica has shown a metric at /metrics" in kept.warnings[0]
        assert kept.rule.name.endswith("/rules/rule-1")
        down = await client.rules.add("e", source="proxy", metric="queue", below=1, step=-2)
        assert (down.rule.type, down.rule.step_size) == (2, 2)

    with_proxy(tmp_path, body)


def test_a_proxy_that_goes_away_scales_nothing_down(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client, seen: Proxy) -> None:
        uid = (await client.endpoints.create("e", model="m", replicas=4)).uid
        await client.rules.add("e", source="proxy", metric="concurrency", below=5, step=-1, cooldown=0)
        async with proxy(running, client, "p2") as other:
            await until(lambda: _true(seen.members == ["p1", "p2"]))
            for _ in range(3):
                await seen.report(measured(uid, answered=9, concurrency=3))
                await other.report(measured(uid, answered=9, concurrency=100))
                await asyncio.sleep(0.4)
        for _ in range(6):
            await seen.report(measured(uid, answered=9, concurrency=3))
            await asyncio.sleep(0.4)
        assert await desired(client, "e") == 4
        found = await client.rules.explain("e")
        assert "a proxy is away" in found.newest.verdicts[0].reason

    async def _true(value: bool) -> bool:
        return value

    with_proxy(tmp_path, body)
