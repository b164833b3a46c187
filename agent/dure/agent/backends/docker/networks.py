"""A network for each session of several kernels on this node: a bridge on which they find each other by
name."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any

from dure.agent.backends.docker.engine import SLOW_S, Engine, Refusal
from dure.agent.backends.docker.labels import SESSION, Owner
from dure.fleet.v1 import fleet_pb2


class Networks:
    """Lives on one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Kernels of one session start at one time, and engines let two networks have one name.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def provide(self, spec: fleet_pb2.KernelSpec, owner: Owner) -> str:
        """Name of the session's network; empty for a session that spans nodes. Raises EngineError."""
        if not spec.cluster.one_node:
            return ""
        name = f"dure-{spec.session_uid}-{owner.mark}"
        async with self._locks[spec.session_uid]:
            if not await self._find(owner, f"{SESSION}={spec.session_uid}"):
                await self._engine.call(
                    lambda client: client.create_network(
                        name,
                        driver="bridge",
                        check_duplicate=True,
                        labels={**owner.labels, SESSION: spec.session_uid},
                    ),
                    SLOW_S,
                    whole=True,
                )
        return name

    async def release(self, session_uid: str, owner: Owner) -> None:
        """Removes the session's network, unless another of its kernels is still there. Raises EngineError."""
        async with self._locks[session_uid]:
            for network in await self._find(owner, f"{SESSION}={session_uid}"):
                await self._remove(network)
        self._locks.pop(session_uid, None)

    async def tidy(self, owner: Owner) -> None:
        """Removes networks of this agent that nothing is connected to. Raises EngineError."""
        for network in await self._find(owner):
            session_uid = (network.get("Labels") or {}).get(SESSION, "")
            if session_uid not in self._locks:
                await self._remove(network)

    async def _find(self, owner: Owner, *labels: str) -> list[dict[str, Any]]:
        wanted = [*owner.filters, *labels]
        found: list[dict[str, Any]] = await self._engine.call(
            lambda client: client.networks(filters={"label": wanted})
        )
        return found

    async def _remove(self, network: dict[str, Any]) -> None:
        # Refused while a container is connected; gone is as good.
        with contextlib.suppress(Refusal):
            await self._engine.call(lambda client: client.remove_network(network["Id"]), SLOW_S)
