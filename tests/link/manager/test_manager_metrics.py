"""The manager's /metrics and its traces, of the program as it runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import grpc.aio
import metrics_page
import own_ports
import pytest
from metrics_page import value
from otlp_receiver import receiver
from test_manager_program import DEFINITION, Manager, raw, upload

from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.v1 import admin_pb2, admin_pb2_grpc, folder_pb2
from dure.wire import errors
from dure.wire.channel import bearer, open_channel

API = "dure.v1.EndpointService"
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def connect_an_agent(manager: Manager, client: Client) -> None:
    """A stream of an agent that has nothing."""
    token = (await client.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)).token
    async with open_channel(manager.address) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        joined = await stub.Join(fleet_pb2.JoinRequest(agent="a1"), metadata=bearer(token))
        stream = stub.Connect(metadata=bearer(joined.credential))
        await stream.write(fleet_pb2.ConnectRequest(hello=fleet_pb2.Hello(protocol_version=1)))
        await stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(complete=True)))
        assert (await stream.read()).HasField("welcome")
        stream.cancel()


def test_the_page_tells_what_there_is_and_what_was_done(tmp_path: Path) -> None:
    port = own_ports.free_port()

    async def body(manager: Manager) -> None:
        async with asyncio.timeout(60), await manager.client() as client:
            await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
            await upload(manager, "model-definition.yaml", DEFINITION.encode())
            await client.endpoints.create("waits", model="m", replicas=2)
            await client.endpoints.create("stopped", model="m", replicas=0)
            with pytest.raises(errors.NotFound):
                await client.endpoints.get("nobody")
            await connect_an_agent(manager, client)
            watch = asyncio.create_task(_watch(client))
            try:
                while True:
                    page = await metrics_page.read(port)
                    ready = (
                        value(page, "dure_manager_endpoints", status="PENDING") == 1
                        and value(page, "dure_manager_endpoints", status="STOPPED") == 1
                        and value(page, "dure_manager_replicas", status="PENDING") == 2
                        and sum(page["dure_manager_api_open_streams"].values()) >= 1
                    )
                    if ready:
                        break
                    await asyncio.sleep(0.05)
            finally:
                watch.cancel()
                await asyncio.wait({watch})
            labels = {"project": "default", "endpoint": "waits"}
            assert value(page, "dure_manager_endpoint_desired_replicas", **labels) == 2
            assert value(page, "dure_manager_endpoint_ready_replicas", **labels) == 0
            assert sum(page["dure_manager_agents"].values()) == 1
            created = {"method": f"{API}/CreateEndpoint"}
            assert value(page, "dure_manager_api_calls_total", **created, code="OK") == 2
            assert value(page, "dure_manager_api_call_duration_seconds_count", **created) == 2
            missing = {"method": f"{API}/GetEndpoint", "code": "NOT_FOUND"}
            assert value(page, "dure_manager_api_calls_total", **missing) == 1
            assert value(page, "dure_manager_controller_run_duration_seconds_count") >= 2
            assert value(page, "dure_manager_controller_failed_runs_total") == 0
            transactions = value(page, "dure_manager_store_transaction_duration_seconds_count")
            assert transactions >= 4
            assert value(page, "dure_manager_store_wait_seconds_count") >= transactions
            assert value(page, "dure_manager_route_table_revision_number") >= 2
            assert value(page, "dure_manager_controller_queue") == 0
            # What callers make up never becomes a label.
            async with open_channel(manager.address) as channel:
                for number in range(20):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await channel.unary_unary(f"/made.up/Method{number}")(b"", timeout=5)
            page = await metrics_page.read(port)
            methods = {dict(labels)["method"] for labels in page["dure_manager_api_calls_total"]}
            assert not [method for method in methods if not method.startswith("dure.")], methods
            # The stream of the watch ended by its caller's wish.
            while sum(page["dure_manager_api_open_streams"].values()):
                await asyncio.sleep(0.05)
                page = await metrics_page.read(port)

    run(Manager(tmp_path, "--metrics-port", str(port)), body)


async def _watch(client: Client) -> None:
    async for _ in client.endpoints.watch():
        pass


def test_a_restart_takes_the_metrics_port_up_again(tmp_path: Path) -> None:
    port = own_ports.free_port()

    async def body(manager: Manager) -> None:
        async with await manager.client() as client:
            await client.admin.get_cluster()
        assert "dure_manager_info" in await metrics_page.read(port)

    run(Manager(tmp_path, "--metrics-port", str(port)), body)
    run(Manager(tmp_path), body)


def test_calls_are_traced_and_belong_to_their_callers_trace(tmp_path: Path) -> None:
    async def traced() -> None:
        async with receiver() as received:
            manager = Manager(tmp_path, environ=received.environ)
            manager.start()
            try:
                async with asyncio.timeout(45), await manager.client() as client:
                    await client.admin.get_cluster()
                    async with raw(manager) as (channel, metadata):
                        stub = admin_pb2_grpc.AdminServiceStub(channel)
                        carried = (*metadata, ("traceparent", f"00-{TRACE}-{CALLER}-01"))
                        await stub.GetCluster(admin_pb2.GetClusterRequest(), metadata=carried, timeout=10)
                        nonsense = (*metadata, ("traceparent", "00-what-ever"))
                        await stub.GetCluster(admin_pb2.GetClusterRequest(), metadata=nonsense, timeout=10)
                    with pytest.raises(errors.NotFound):
                        await client.endpoints.get("nobody")
                    mine = await received.span(lambda span: span.trace == TRACE)
                    assert (mine.program, mine.parent) == ("dure-manager", CALLER)
                    assert mine.name == "dure.v1.AdminService/GetCluster" and not mine.failed
                    assert mine.attributes["rpc.grpc.status_code"] == 0
                    failed = await received.span(lambda span: span.failed)
                    assert failed.name == f"{API}/GetEndpoint" and failed.message == "NOT_FOUND"
                    await received.span(lambda span: not span.parent and "GetCluster" in span.name)
            finally:
                assert await asyncio.to_thread(manager.end) == 0

    asyncio.run(traced())


def test_a_collector_that_is_away_holds_up_nobody(tmp_path: Path) -> None:
    away = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{own_ports.free_port()}"}

    began_s = time.monotonic()

    async def body(manager: Manager) -> None:
        nonlocal began_s
        async with await manager.client() as client, asyncio.timeout(20):
            for _ in range(20):
                await client.admin.get_cluster()
        began_s = time.monotonic()

    run(Manager(tmp_path, environ=away), body)
    assert time.monotonic() - began_s < 5, "it waited for the collector at its end"


def run(manager: Manager, body) -> None:
    manager.start()
    try:
        asyncio.run(body(manager))
    finally:
        assert manager.end() == 0


SET_UP = """
import logging, os, sys
logging.basicConfig()
{before}
from dure.wire import tracing
found = tracing.set_up("manager", "m")
print(found is None, any(name.startswith("opentelemetry.sdk") for name in sys.modules))
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("os.environ.pop('OTEL_EXPORTER_OTLP_ENDPOINT', None)", ""),
        (
            "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:1'\n"
            "sys.modules['opentelemetry'] = None",
            "pip install 'dure[otel]'",
        ),
    ],
)
def test_without_being_asked_or_without_packages_there_are_no_traces(before: str, said: str) -> None:
    code = SET_UP.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "True False\n"
    assert said in done.stderr and bool(done.stderr) == bool(said)
