"""Nodes that run kernels as containers: an agent, a manager that behaves, and what a test asks of them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from agent_fakes import AgentProcess, FakeManager, cluster, spec
from containers import engines

from dure.fleet.v1 import fleet_pb2

LIMIT_S = 300.0


@contextlib.asynccontextmanager
async def node(
    tmp_path: Path,
    *arguments: str,
    engine: str = engines.URL,
    limit_s: float = LIMIT_S,
    prefix: Sequence[str] = (),
) -> AsyncIterator[tuple[FakeManager, AgentProcess]]:
    """Afterwards nothing of it is left, on the engine neither."""
    home = tmp_path / "data" / "agents" / "node-1"
    try:
        async with cluster(
            tmp_path,
            *("--backend", "docker", "--engine", engine),
            *arguments,
            limit_s=limit_s,
            prefix=prefix,
        ) as (manager, agent):
            yield manager, agent
    finally:
        left = engines.left_behind(home)
    assert left == [], left


def kernel(uid: str, command: list[str] | str | None = None, **fields: Any) -> fleet_pb2.KernelSpec:
    """As `spec` of the fakes, in the image of the tests unless another is named."""
    return spec(uid, command, **{"image": engines.IMAGE, **fields})


async def container(agent: AgentProcess, uid: str) -> dict[str, Any]:
    """The engine's words on the one container of a kernel."""

    def look() -> dict[str, Any]:
        known_as = agent.manager.wire(uid)
        found = [c for c in engines.containers_of(agent.home) if c["Labels"].get("dure.kernel") == known_as]
        assert len(found) == 1, found
        with engines.client() as engine:
            inspected: dict[str, Any] = engine.inspect_container(found[0]["Id"])
            return inspected

    return await asyncio.to_thread(look)


async def names(agent: AgentProcess) -> list[str]:
    """Uids of all kernels that have a container, running or not."""
    found = await asyncio.to_thread(engines.containers_of, agent.home)
    return sorted(agent.manager.plain(one["Labels"].get("dure.kernel", "")) for one in found)


async def ask(status: fleet_pb2.KernelStatus, path: str = "/x") -> str:
    """What a kernel answers."""

    def get() -> str:
        with urllib.request.urlopen(f"http://{status.host}:{status.port}{path}", timeout=10) as response:
            text: str = response.read().decode()
            return text

    return await asyncio.to_thread(get)


async def answers(status: fleet_pb2.KernelStatus) -> bool:
    try:
        await ask(status)
    except (OSError, urllib.error.URLError, http.client.HTTPException):
        return False
    return True


async def report(manager: FakeManager, agent: AgentProcess, uid: str) -> Any:
    """What the command of a kernel has written to `report.json` in its home."""
    file = agent.kernel_folder(uid) / "home" / "report.json"
    found: list[Any] = []

    def written() -> bool:
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text(encoding="utf-8")))
        status = manager.statuses.get(uid)
        assert found or status is None or not status.HasField("exit"), status
        return bool(found)

    await manager.until(written)
    return found[-1]
