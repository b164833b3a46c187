"""Requests that wait while their endpoint is at zero, until its first replica serves.

The room is bounded, per endpoint and over all of them: what is kept of a request that waits is its head and
what the sockets' buffers have of its body, which is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

HELD_PER_ENDPOINT = 8_000
HELD_BYTES_PER_ENDPOINT_MAX = 100 * 1024 * 1024
HELD_MAX = 10_000
HELD_BYTES_MAX = 256 * 1024 * 1024
# So many of an endpoint's requests are on their way to a replica at once: a thousand connections in one
# moment are more than the queue of a listening socket takes, and most would be refused or dropped.
AT_ONCE_MAX = 16


class Full(Exception):
    """No room for one more."""


@dataclass(eq=False, slots=True)
class _Line:
    """Those who wait for one endpoint, oldest first."""

    waiters: OrderedDict[int, asyncio.Future[None]] = field(default_factory=OrderedDict)
    size_bytes: int = 0
    free: bool = False


class Holding:
    """Holds requests, `per_endpoint` at most; `on_first` is called when the first of an endpoint is held."""

    def __init__(self, per_endpoint: int = HELD_PER_ENDPOINT) -> None:
        self._per_endpoint = per_endpoint
        self.on_first: list[Callable[[], None]] = []
        self._lines: dict[str, _Line] = {}
        self._count = 0
        self._size_bytes = 0
        self._last = 0

    def held(self) -> Mapping[str, int]:
        """How many requests wait, by endpoint uid; those with none are not there."""
        return {uid: len(line.waiters) for uid, line in self._lines.items()}

    async def wait(self, endpoint_uid: str, size_bytes: int) -> None:
        """Returns when it may go on; then call `pass_on` once, at the latest when it ends. Raises Full.

        Set a time limit.
        """
        line = self._lines.get(endpoint_uid)
        if self._count >= HELD_MAX or self._size_bytes + size_bytes > HELD_BYTES_MAX:
            raise Full
        if line is not None and (
            len(line.waiters) >= self._per_endpoint
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
        except asyncio.CancelledError:
            # Let go in the very moment in which its client left.
            if waiter.done() and not waiter.cancelled():
                self.pass_on(endpoint_uid)
            raise
        finally:
            self._count -= 1
            self._size_bytes -= size_bytes
            line.size_bytes -= size_bytes
            line.waiters.pop(ticket, None)
            if not line.waiters and self._lines.get(endpoint_uid) is line:
                del self._lines[endpoint_uid]

    def free(self, endpoint_uid: str) -> None:
        """Lets those go on that wait for an endpoint, oldest first: a few, then one for each `pass_on`."""
        line = self._lines.get(endpoint_uid)
        if line is None or line.free:
            return
        line.free = True
        for _ in range(AT_ONCE_MAX):
            self.pass_on(endpoint_uid)

    def keep(self, endpoint_uid: str) -> None:
        """Those who still wait for an endpoint wait until it is freed again."""
        line = self._lines.get(endpoint_uid)
        if line is not None:
            line.free = False

    def pass_on(self, endpoint_uid: str) -> None:
        """One that was let go has reached a replica, or given up: the next may go."""
        line = self._lines.get(endpoint_uid)
        if line is None or not line.free:
            return
        for waiter in line.waiters.values():
            if not waiter.done():
                waiter.set_result(None)
                return
