"""Containers of this agent on its engine: whose they are, how they are found, looked at, ended and
removed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dure.agent.backends import accounting, cgroups
from dure.agent.backends.docker import labels
from dure.agent.backends.docker.engine import SLOW_S, Engine, NoAnswer, NotThere, Refusal
from dure.agent.backends.docker.labels import Owner, Seen
from dure.agent.backends.docker.logs import LogCopy
from dure.agent.backends.docker.watch import Watch
from dure.wire import identity
from dure.wire.backoff import backoff_s

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(eq=False)
class Kernel:
    """What is known of one kernel. `begun_s` is CLOCK_BOOTTIME at the start of its command, 0 before;
    `session` is the one whose network it may have a part in."""

    log: LogCopy
    container: str = ""
    session: str = ""
    seen: Seen | None = None
    begun_s: float = 0.0
    stopping: bool = False
    groups: accounting.Groups | None = None
    folders: list[Path] = field(default_factory=list)

    def find_groups(self) -> None:
        """Its control groups, by its first process."""
        self.folders = cgroups.folders_of(self.seen.pid) if self.seen is not None and self.seen.pid else []

    def pids(self) -> frozenset[int]:
        """Of all its processes, on the node."""
        if not self.folders:
            self.find_groups()
        return frozenset(cgroups.members(self.folders[:1]))


class Containers:
    """Lives on one event loop. `home` is the agent's own folder."""

    def __init__(self, engine: Engine, watch: Watch, home: Path) -> None:
        self._engine = engine
        self._watch = watch
        self._home = home

    def owner(self) -> Owner | None:
        """None before the agent has joined: it can own nothing then."""
        who = identity.load(self._home)
        return Owner(who.uid, str(self._home.absolute())) if who is not None else None

    def known_owner(self) -> Owner:
        owner = self.owner()
        assert owner is not None, "kernels come from a manager that the agent has joined"
        return owner

    async def own(self, *more: str) -> list[dict[str, Any]]:
        """All of this agent's, those that have ended too, with these labels more. Raises EngineError."""
        owner = self.owner()
        if owner is None:
            return []
        wanted = [*owner.filters, *more]
        found: list[dict[str, Any]] = await self._engine.call(
            lambda client: client.containers(all=True, filters={"label": wanted})
        )
        return found

    async def of(self, uid: str) -> list[dict[str, Any]]:
        """Those of one kernel: one, but for a moment of a start that is repeated. Raises EngineError."""
        return await self.own(f"{labels.KERNEL}={uid}")

    async def look(self, uid: str, container: str = "") -> Seen | None:
        """None if there is no container of the kernel. Raises EngineError."""
        if not container:
            listed = await self.of(uid)
            if not listed:
                return None
            container = listed[0]["Id"]
        try:
            return labels.seen(await self._engine.call(lambda client: client.inspect_container(container)))
        except NotThere:
            return None

    async def kill(self, container: str, signal: str) -> None:
        """Raises EngineError, but not for one that does not run any more: that is what was wanted."""
        with contextlib.suppress(Refusal):
            await self._engine.call(lambda client: client.kill(container, signal))

    async def until_ended(self, uid: str, found: Seen, limit_s: float) -> Seen | None:
        """The container once it has ended, or after `limit_s`; None if it is gone. Raises EngineError."""
        deadline_s = time.monotonic() + limit_s
        pause_s = 0.05
        now: Seen | None = found
        while now is not None and now.running and (left_s := deadline_s - time.monotonic()) > 0:
            await self._watch.moved(uid, min(pause_s, left_s))
            pause_s = min(pause_s * 2, 1.0)
            now = await self.look(uid, found.id)
        return now

    async def remove(self, container: str) -> None:
        """Ends it too. Raises EngineError."""
        with contextlib.suppress(NotThere):
            await self._engine.call(
                lambda client: client.remove_container(container, force=True, v=True), SLOW_S, whole=True
            )


async def insist(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Until the engine answers: one that hangs while an agent starts must not end kernels that run."""
    attempt = 0
    while True:
        try:
            return await ask()
        except NoAnswer as error:
            attempt += 1
            if attempt == 1:
                _log.warning("cannot look at a kernel's container yet: %s", error)
        await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))
