"""An agent that takes kernels that run in images, and reports of them what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
from link.manager.test_manager_program import Manager

from dure.agent.storage import ManagerStorage
from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.v1 import admin_pb2
from dure.wire.channel import bearer, open_channel


def with_program(tmp_path: Path, body: Callable[[Manager, Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), await manager.client() as client:
            await client.admin.get_cluster()
            await body(manager, client)

    manager = Manager(tmp_path, "--log-level", "debug")
    manager.start()
    try:
        asyncio.run(run())
    finally:
        assert manager.end() == 0


class Agent:
    """An agent's stream, and the kernels that it was given."""

    def __init__(self, stub: Any, stream: Any, credential: str) -> None:
        self.stub, self.stream, self.credential = stub, stream, credential
        self.storage = ManagerStorage(stub)
        self.storage.announce(credential, fleet_pb2.Welcome())
        self.specs: dict[str, fleet_pb2.KernelSpec] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (message := await self.stream.read()) is not grpc.aio.EOF:
            self.specs.update({spec.uid: spec for spec in message.desired.kernels})

    async def kernel(self, endpoint: str) -> fleet_pb2.KernelSpec:
        async with asyncio.timeout(10):
            while True:
                for spec in self.specs.values():
                    if spec.endpoint == endpoint:
                        return spec
                await asyncio.sleep(0.02)

    async def report(self, spec: fleet_pb2.KernelSpec, **fields: Any) -> None:
        status = fleet_pb2.KernelStatus(uid=spec.uid, generation=spec.generation, **fields)
        await self.stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[status])))

    async def end(self) -> None:
        self.stream.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@contextlib.asynccontextmanager
async def agent(manager: Manager, client: Client, name: str) -> AsyncIterator[Agent]:
    token = (await client.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)).token
    async with open_channel(manager.address) as channel:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        joined = await stub.Join(fleet_pb2.JoinRequest(agent=name), metadata=bearer(token))
        stream = stub.Connect(metadata=bearer(joined.credential))
        hello = fleet_pb2.Hello(
            protocol_version=1, backend="test", host_id=name, architecture="x86_64", runs_images=True
        )
        hello.slots["cpu"], hello.slots["mem"] = 4_000, 2**33 * 1000
        hello.maps_mounts = True
        await stream.write(fleet_pb2.ConnectRequest(hello=hello))
        await stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(complete=True)))
        running = Agent(stub, stream, joined.credential)
        try:
            yield running
        finally:
            await running.end()


async def serve(client: Client, name: str, image: str) -> None:
    slots = {"cpu": "0.1", "mem": "64m"}
    await client.endpoints.create(
        name, model="m", image=image, architecture="x86_64", replicas=1, resource_slots=slots
    )


@contextlib.asynccontextmanager
async def agent_again(manager: Manager, credential: str) -> AsyncIterator[Agent]:
    async with open_channel(manager.address) as channel:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        running = Agent(stub, stub.Connect(metadata=bearer(credential)), credential)
        try:
            yield running
        finally:
            await running.end()
