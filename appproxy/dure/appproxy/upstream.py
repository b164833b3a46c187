"""Connections to replicas, and the pool of idle ones.

Idle connections are few and short-lived on purpose: llama.cpp's server gives each a thread, and a handful
of idle ones starve its /health for seconds. A connection that has been idle for long, or that the other
side has closed already, is never used for a request: most races with a server's own idle limit end there.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from dure.appproxy.response import Cut, Event, Malformed, ResponseReader

CONNECT_TIMEOUT_S = 2.0
# Model servers with a thread per connection (llama.cpp's) starve their own /health under many idle ones:
# few are kept for IDLE_MAX_S, more only from one request of a busy moment to the next.
IDLE_PER_REPLICA_MAX = 48
IDLE_KEPT_PER_REPLICA = 8
IDLE_MAX_S, IDLE_BURST_MAX_S = 2.0, 0.2
SWEEP_S = 0.1
# A request that must not be sent twice takes no connection that was idle for longer.
IDLE_FOR_UNSAFE_MAX_S = 1.0
# Body bytes of a response that may wait for a slow client before reading from the replica pauses.
READ_AHEAD_BYTES_MAX = 256 * 1024

Address = tuple[str, int]


class ConnectFailed(Exception):
    """No connection; nothing was sent."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time: `begin`, `write` the request, `take` events until the End."""

    def __init__(self) -> None:
        self.reused = False
        self.idle_since_s = 0.0
        self.on_idle_lost: Callable[[Connection], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._events: deque[Event] = deque()
        self._held_bytes = 0
        self._reading_paused = False
        self._wake: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._lost = False
        self._error: Malformed | Cut | None = None
        self._raw: Callable[[bytes], None] | None = None
        self._raw_end: Callable[[], None] | None = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        if self._raw is not None:
            self._raw(data)
            return
        if self._reader is None or self.on_idle_lost is not None:
            # Nothing was asked for: whatever this is, it must not become the answer to the next request.
            self.abort()
            return
        if self._reader.done:
            self._reader.feed(data)
            if len(self._reader.excess) > READ_AHEAD_BYTES_MAX:
                self.pause_reading()
            return
        try:
            events = self._reader.feed(data)
        except Malformed as error:
            self._error = error
            self.abort()
            events = []
        self._events.extend(events)
        self._held_bytes += len(data)
        if self._held_bytes > READ_AHEAD_BYTES_MAX:
            self.pause_reading()
        self._wake_up()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._raw_end is not None:
            self._raw_end()
        elif self._reader is not None and not self._reader.done and self._error is None:
            try:
                if exc is not None:
                    raise Cut(f"the connection broke: {exc}")
                self._events.extend(self._reader.feed_eof())
            except Cut as error:
                self._error = error
        self._wake_up()
        self.resume_writing()
        if self.on_idle_lost is not None:
            self.on_idle_lost(self)

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        waiter, self._writable = self._writable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What an exchange calls.

    @property
    def answered(self) -> bool:
        """Whether a byte of the response has come."""
        return self._reader is not None and self._reader.started

    @property
    def alive(self) -> bool:
        """Whether the connection stands and nothing waits to be read: looks at the socket itself.

        The event loop may know of an end only in its next round.
        """
        if self._lost or self._transport is None or self._transport.is_closing():
            return False
        sock = self._transport.get_extra_info("socket")
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    @property
    def writing_paused(self) -> bool:
        return self._writable is not None

    def begin(self, method: str) -> None:
        self._reader = ResponseReader(method)
        self._events.clear()
        self._held_bytes = 0
        self._error = None

    def write(self, data: bytes) -> None:
        """Sends; what a connection that is gone was given is lost, and `take` says so."""
        if self._transport is not None and not self._lost:
            self._transport.write(data)

    async def drain(self) -> None:
        """Waits until the replica has taken what was written."""
        if self._writable is not None and not self._lost:
            await asyncio.shield(self._writable)

    def ready(self) -> bool:
        """Whether `take` would return at once."""
        return bool(self._events) or self._error is not None

    async def wait(self) -> None:
        """Waits for an event. Raises Malformed or Cut once none is left."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None

    async def take(self) -> list[Event]:
        """All events that are there, at least one. Raises like `wait`."""
        await self.wait()
        events = list(self._events)
        self._events.clear()
        self._held_bytes = 0
        self.resume_reading()
        return events

    def reusable(self) -> bool:
        """Whether the exchange ended so that another may follow."""
        return (
            not self._lost
            and self._error is None
            and self._reader is not None
            and self._reader.done
            and not self._reader.excess
            and not self._reading_paused
        )

    def tunnel(self, received: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        """After a 101: what comes is no HTTP any more, and goes to `received`."""
        assert self._reader is not None
        self._raw, self._raw_end = received, ended
        self.resume_reading()
        if self._reader.excess:
            received(self._reader.excess)
        if self._lost:
            ended()

    def pause_reading(self) -> None:
        if not self._reading_paused and self._transport is not None and not self._lost:
            self._reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            if not self._lost:
                self._transport.resume_reading()

    def close(self) -> None:
        """Ends it once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends it at once: the replica notices."""
        if self._transport is not None:
            self._transport.abort()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Pool:
    """Idle connections by address. `sweep` has to run; `close` ends them all."""

    def __init__(self) -> None:
        self._idle: dict[Address, deque[Connection]] = {}
        self.opened = 0
        self.reused = 0

    async def acquire(self, address: Address, *, safe: bool) -> Connection:
        """An idle connection, or a new one. `safe`: the request may be repeated if the connection was dead.

        Raises ConnectFailed.
        """
        now_s = asyncio.get_running_loop().time()
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            idle_s = now_s - connection.idle_since_s
            young = idle_s <= (IDLE_MAX_S if safe else IDLE_FOR_UNSAFE_MAX_S)
            fit = young and connection.alive
            connection.on_idle_lost = None
            if fit:
                connection.reused = True
                self.reused += 1
                return connection
            connection.close()
        connection = await connect(address)
        self.opened += 1
        return connection

    def release(self, address: Address, connection: Connection) -> None:
        """Takes back a connection: kept if it can be used again and there is room, else ended."""
        if not connection.reusable():
            connection.abort()
            return
        idle = self._idle.setdefault(address, deque())
        if len(idle) >= IDLE_PER_REPLICA_MAX:
            idle.popleft().close()
        connection.idle_since_s = asyncio.get_running_loop().time()
        connection.on_idle_lost = lambda lost: self._forget(address, lost)
        idle.append(connection)

    def drop(self, address: Address) -> None:
        """Ends the idle connections to a replica that gets no more requests."""
        for connection in self._idle.pop(address, ()):
            connection.on_idle_lost = None
            connection.close()

    def close(self) -> None:
        for address in list(self._idle):
            self.drop(address)

    async def sweep(self) -> None:
        """Ends connections that have been idle for too long, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = asyncio.get_running_loop().time()
            for address, idle in list(self._idle.items()):
                # The oldest stands first.
                while idle and now_s - idle[0].idle_since_s > (
                    IDLE_BURST_MAX_S if len(idle) > IDLE_KEPT_PER_REPLICA else IDLE_MAX_S
                ):
                    connection = idle.popleft()
                    connection.on_idle_lost = None
                    connection.close()
                if not idle:
                    del self._idle[address]

    def idle_count(self) -> int:
        return sum(len(idle) for idle in self._idle.values())

    def _forget(self, address: Address, connection: Connection) -> None:
        idle = self._idle.get(address)
        if idle is not None:
            with contextlib.suppress(ValueError):
                idle.remove(connection)
            if not idle:
                del self._idle[address]


async def connect(address: Address) -> Connection:
    """A new connection. Raises ConnectFailed after at most CONNECT_TIMEOUT_S."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, *address)
    except TimeoutError as error:
        raise ConnectFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise ConnectFailed(str(error)) from error
    return connection
