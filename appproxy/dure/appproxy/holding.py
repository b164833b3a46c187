"""Requests that wait while their endpoint is at zero, until its first replica serves.

The room is bounded, per endpoint and over all of them: what is kept of a request that waits is its head and
what the sockets' buffers have of its body, which is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

HELD_PER_ENDPOINT_MAX = 1_000
HELD_BYTES_PER_ENDPOINT_MAX = 100 * 1024 * 1024
HELD_MAX = 10_000
HELD_BYTES_MAX = 256 * 1024 * 1024


class Full(Exception):
    """No room for one more."""


@dataclass(eq=False, slots=True)
class _Line:
    """Those who wait for one endpoint, oldest first."""

    waiters: OrderedDict[int, asyncio.Future[None]] = field(default_factory=OrderedDict)
    size_bytes: int = 0


class Holding:
    """Holds requests by endpoint. `on_first` is called when the first of an endpoint is held."""

    def __init__(self) -> None:
        self.on_first: list[Callable[[], None]] = []
        self._lines: dict[str, _Line] = {}
        self._count = 0
        self._size_bytes = 0
        self._last = 0

    def held(self) -> Mapping[str, int]:
        """How many requests wait, by endpoint uid; those with none are not there."""
        return {uid: len(line.waiters) for uid, line in self._lines.items()}

    async def wait(self, endpoint_uid: str, size_bytes: int) -> None:
        """Returns once `free` was called for the endpoint; set a time limit. Raises Full."""
        line = self._lines.get(endpoint_uid)
        if self._count >= HELD_MAX or self._size_bytes + size_bytes > HELD_BYTES_MAX:
            raise Full
        if line is not None and (
            len(line.waiters) >= HELD_PER_ENDPOINT_MAX
            or line.size_bytes + size_bytes > HELD_BYTES_PER_ENDPOINT_MAX
        ):
            raise Full
        first = line is None
        if line is None:
            line = self._lines[endpoint_uid] = _Line()
        self._last += 1
        ticket = self._last
        waiter = line.waiters[ticket] = asyncio.get_running_loop().create_future()
        self._count += 1
        self._size_bytes += size_bytes
        line.size_bytes += size_bytes
        if first:
            for callback in self.on_first:
                callback()
        try:
            await waiter
        finally:
            self._count -= 1
            self._size_bytes -= size_bytes
            line.size_bytes -= size_bytes
            line.waiters.pop(ticket, None)
            if not line.waiters and self._lines.get(endpoint_uid) is line:
                del self._lines[endpoint_uid]

    def free(self, endpoint_uid: str) -> None:
        """Lets all go on that wait for an endpoint, oldest first. They look again at what there is."""
        line = self._lines.pop(endpoint_uid, None)
        for waiter in line.waiters.values() if line is not None else ():
            if not waiter.done():
                waiter.set_result(None)
