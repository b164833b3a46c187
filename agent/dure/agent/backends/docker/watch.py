"""Ends of this agent's containers, as the engine's events tell them.

Events only wake: who waits looks at the container itself. After a stream that broke it goes on where it was,
and everybody looks once, for what the engine may have forgotten meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable

from dure.agent.backends.docker import streams
from dure.agent.backends.docker.engine import Engine, EngineError
from dure.agent.backends.docker.labels import KERNEL, Owner
from dure.wire.backoff import backoff_s

# Whoever waits looks this often even if nothing is heard.
LOOK_S = 15.0
_log = logging.getLogger(__name__)


class Watch:
    """`run` must run for `moved` to be prompt; without it, it is slow."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._events: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._since = f"{time.time():.9f}"
        # Kernels whose containers somebody had the engine kill: this agent, or another.
        self._killed: set[str] = set()

    def expect(self, uid: str) -> None:
        """From now on nothing that is heard of the kernel's container is lost, whoever asks how late."""
        self._events[uid]

    async def moved(self, uid: str, limit_s: float = LOOK_S) -> None:
        """Until something was heard of the kernel's container since the last call, or `limit_s`."""
        event = self._events[uid]
        try:
            async with asyncio.timeout(limit_s):
                await event.wait()
        except TimeoutError:
            return
        event.clear()

    def wake(self, uid: str) -> None:
        if uid in self._events:
            self._events[uid].set()

    def forget(self, uid: str) -> None:
        self._events.pop(uid, None)
        self._killed.discard(uid)

    def was_killed(self, uid: str) -> bool:
        """Whether the engine was told to kill it, as far as was heard: a signal of the node's is none of
        that."""
        return uid in self._killed

    async def run(self, owner: Callable[[], Owner | None]) -> None:
        """Until cancelled. There is no owner before the agent has joined."""
        attempt = 0
        while True:
            who = owner()
            if who is None:
                await asyncio.sleep(0.1)
                continue
            try:
                async with streams.events(self._engine.socket, who.filters, self._since) as events:
                    if attempt:
                        _log.info("events of the container engine are heard again")
                    attempt = 0
                    for uid in list(self._events):
                        self.wake(uid)
                    async for event in events:
                        self._since = _after(event)
                        attributes = event.get("Actor", {}).get("Attributes", {})
                        uid = attributes.get(KERNEL, "")
                        if event.get("Action") == "kill" and uid in self._events:
                            self._killed.add(uid)
                        self.wake(uid)
            except EngineError as error:
                if not attempt:
                    _log.warning("no events of the container engine (%s); trying again", error)
            attempt += 1
            await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))


def _after(event: dict[str, object]) -> str:
    nanoseconds = event.get("timeNano")
    if not isinstance(nanoseconds, int):
        return f"{time.time():.9f}"
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"
