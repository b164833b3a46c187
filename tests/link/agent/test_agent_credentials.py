"""How an agent asks its manager with what to fetch an image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from dure.agent.storage import ManagerStorage
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire import errors
from dure.wire.channel import open_channel


class OldManager(fleet_pb2_grpc.FleetServiceServicer):
    """From before there were credentials."""


class SilentManager(fleet_pb2_grpc.FleetServiceServicer):
    async def GetImageCredential(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(60)


class GoodManager(fleet_pb2_grpc.FleetServiceServicer):
    async def GetImageCredential(self, request: Any, context: Any) -> Any:
        assert ("authorization", "Bearer credential-of-agent") in context.invocation_metadata()
        if request.kernel_uid != "mine":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this agent has no such kernel")
        return fleet_pb2.GetImageCredentialResponse(username="robot", password="secret")


def asking(
    servicer: fleet_pb2_grpc.FleetServiceServicer | None,
    body: Callable[[ManagerStorage], Awaitable[None]],
    *,
    announced: bool = True,
) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        if servicer is not None:
            fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server)
            await server.start()
        try:
            async with asyncio.timeout(20), open_channel(f"127.0.0.1:{port}") as channel:
                storage = ManagerStorage(fleet_pb2_grpc.FleetServiceStub(channel))
                if announced:
                    storage.announce("credential-of-agent", fleet_pb2.Welcome())
                await body(storage)
        finally:
            await server.stop(0)

    asyncio.run(run())


def test_an_answer_and_a_refusal() -> None:
    async def body(storage: ManagerStorage) -> None:
        assert await storage.image_credential("mine") == ("robot", "secret")
        with pytest.raises(errors.PermissionDenied):
            await storage.image_credential("another's")

    asking(GoodManager(), body)


def test_an_old_manager_has_none() -> None:
    async def body(storage: ManagerStorage) -> None:
        assert await storage.image_credential("mine") == ("", "")

    asking(OldManager(), body)


@pytest.mark.parametrize(
    ("servicer", "announced"), [(SilentManager(), True), (None, True), (GoodManager(), False)]
)
def test_nobody_waits_for_ever(servicer: fleet_pb2_grpc.FleetServiceServicer | None, announced: bool) -> None:
    """A manager that hangs, one that is not there, and an agent that has not been welcomed yet."""

    async def body(storage: ManagerStorage) -> None:
        with pytest.raises(errors.TimedOut, match=r"within 0\.3 s with what to fetch the image"):
            await storage.image_credential("mine", limit_s=0.3)

    asking(servicer, body, announced=announced)
