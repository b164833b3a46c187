"""A manager that keeps everything in memory and does as it is told: real gRPC on a port of its own.

One file per service beside this one; what they share is in `fake_state.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
from link.client.fake_agents import Admin, Agents
from link.client.fake_endpoints import Endpoints
from link.client.fake_folders import Folders, Tokens
from link.client.fake_registries import Registries
from link.client.fake_scaling import Scaling
from link.client.fake_state import KEY, FakeManager, until

from dure.client.context import Context, save_context
from dure.v1 import (
    admin_pb2_grpc,
    agent_pb2_grpc,
    endpoint_pb2_grpc,
    folder_pb2_grpc,
    registry_pb2_grpc,
    scaling_pb2_grpc,
    token_pb2_grpc,
)
from dure.wire.channel import SERVER_OPTIONS

__all__ = ["KEY", "FakeManager", "fake_manager", "until", "write_context"]


@asynccontextmanager
async def fake_manager(port: int = 0, fake: FakeManager | None = None) -> AsyncIterator[FakeManager]:
    """A fake that serves while the block runs; given one, it serves that one's state again."""
    fake = fake or FakeManager()
    server = grpc.aio.server(options=list(SERVER_OPTIONS))
    endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(Endpoints(fake), server)
    folder_pb2_grpc.add_FolderServiceServicer_to_server(Folders(fake), server)
    token_pb2_grpc.add_TokenServiceServicer_to_server(Tokens(fake), server)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(Registries(fake), server)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Agents(fake), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(fake), server)
    scaling_pb2_grpc.add_ScalingServiceServicer_to_server(Scaling(fake), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    fake.address = f"127.0.0.1:{bound}"
    fake.context = Context(fake.address, KEY)
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


def write_context(fake: FakeManager, folder: Path) -> Path:
    path = folder / "context.toml"
    save_context(path, fake.context)
    return path
