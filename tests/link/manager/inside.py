"""A whole manager inside of the test's own process, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from own_ports import free_port

from dure.client import Client
from dure.manager import main
from dure.v1 import folder_pb2
from dure.wire.errors import ManagerUnreachable

DEFINITION = """
models:
  - name: m
    model_path: /models
    service: {start_command: [serve, "{port}"], port: 8000}
"""


@dataclass(frozen=True)
class Inside:
    """A running manager, and its first administrator's key."""

    home: Path
    address: str
    key: str

    def client(self, key: str | None = None, project: str = "default") -> Client:
        return Client(self.address, key or self.key, project, retry_s=5)


@contextlib.asynccontextmanager
async def manager_inside(home: Path, port: int = 0) -> AsyncIterator[Inside]:
    port = port or free_port()
    task = asyncio.create_task(main.run(main.Settings(home, "127.0.0.1", port, 1.0)))
    try:
        async with asyncio.timeout(20):
            while not (home / "admin.key").exists() and not task.done():
                await asyncio.sleep(0.02)
            running = Inside(home, f"127.0.0.1:{port}", (home / "admin.key").read_text().strip())
            async with Client(running.address, running.key, retry_s=0.5) as client:
                while not task.done():
                    with contextlib.suppress(ManagerUnreachable):
                        await client.admin.get_cluster()
                        break
            if task.done():
                task.result()
        yield running
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def with_inside(home: Path, body: Callable[[Inside, Client], Awaitable[None]], timeout_s: float = 60) -> None:
    async def run() -> None:
        async with asyncio.timeout(timeout_s), manager_inside(home) as running, running.client() as admin:
            await body(running, admin)

    asyncio.run(run())


async def model_folder(client: Client, folder: Path, name: str = "m") -> None:
    """A folder with a definition file in the client's project."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-definition.yaml").write_text(DEFINITION)
    await client.folders.create(name, folder_pb2.FOLDER_USAGE_MODEL)
    await client.folders.upload(name, folder)


async def until(true: Callable[[], Awaitable[bool]], timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not await true():
            await asyncio.sleep(0.05)
