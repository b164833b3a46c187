"""A network for each session of several kernels, on which they find each other by name: a bridge where all
are on this node, an overlay where their nodes are one swarm."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any

from dure.agent.backends.docker.engine import SLOW_S, Engine, Refusal
from dure.agent.backends.docker.labels import SESSION, Owner
from dure.fleet.v1 import fleet_pb2

# What an engine answers to who would make an overlay: another was faster, or it is but a worker of its swarm.
_NOT_OURS_TO_MAKE = (409, 403)


def name_of(spec: fleet_pb2.KernelSpec, owner: Owner) -> str:
    """Of its session's own network; empty if it has none. An overlay has one name on all nodes."""
    if spec.cluster.overlay:
        return overlay_of(spec.session_uid)
    return f"dure-{spec.session_uid}-{owner.mark}" if spec.cluster.one_node else ""


def overlay_of(session_uid: str) -> str:
    return f"dure-{session_uid}"


class Networks:
    """Lives on one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Kernels of one session start at one time, and engines let two networks have one name.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def span(self, spec: fleet_pb2.KernelSpec, owner: Owner) -> None:
        """Makes the overlay of a session, if it is not there and this engine can. Raises EngineError."""
        async with self._locks[spec.session_uid]:
            try:
                await self._make(name_of(spec, owner), spec, owner, driver="overlay", attachable=True)
            except Refusal as error:
                if error.status_code not in _NOT_OURS_TO_MAKE:
                    raise

    async def provide(self, spec: fleet_pb2.KernelSpec, owner: Owner) -> str:
        """Name of the session's network, empty for none of its own. A bridge is there then, an overlay may
        not be. Raises EngineError."""
        name = name_of(spec, owner)
        if spec.cluster.one_node:
            async with self._locks[spec.session_uid]:
                if not await self._find(*owner.filters, f"{SESSION}={spec.session_uid}"):
                    await self._make(name, spec, owner, driver="bridge")
        return name

    async def release(self, session_uid: str, owner: Owner) -> None:
        """Removes the session's network, unless another of its kernels is still there. Raises EngineError."""
        async with self._locks[session_uid]:
            for network in await self._find(f"{SESSION}={session_uid}"):
                labels = network.get("Labels") or {}
                # The last one out removes an overlay, whoever made it.
                if owner.labels.items() <= labels.items() or network.get("Name") == overlay_of(session_uid):
                    await self._remove(network)
        self._locks.pop(session_uid, None)

    async def tidy(self, owner: Owner) -> None:
        """Removes networks of this agent that nothing is connected to. Raises EngineError."""
        for network in await self._find(*owner.filters):
            session_uid = (network.get("Labels") or {}).get(SESSION, "")
            if session_uid not in self._locks:
                await self._remove(network)

    async def _make(self, name: str, spec: fleet_pb2.KernelSpec, owner: Owner, **kind: Any) -> None:
        labels = {**owner.labels, SESSION: spec.session_uid}
        await self._engine.call(
            lambda client: client.create_network(name, check_duplicate=True, labels=labels, **kind),
            SLOW_S,
            whole=True,
        )

    async def _find(self, *labels: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._engine.call(
            lambda client: client.networks(filters={"label": list(labels)})
        )
        return found

    async def _remove(self, network: dict[str, Any]) -> None:
        # Refused while a container is connected, on any node, and by a swarm's worker; gone is as good.
        with contextlib.suppress(Refusal):
            await self._engine.call(lambda client: client.remove_network(network["Id"]), SLOW_S)
