"""Listening sockets: one per endpoint's port as the table wants them, or one for a whole domain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from dure.appproxy.front import Front
from dure.appproxy.live import Endpoint, Live

log = logging.getLogger(__name__)

BIND_RETRY_S = 1.0
_BACKLOG = 1024


@dataclass(frozen=True)
class BindFailure:
    """A port that the table wants and the operating system refuses."""

    endpoint_uid: str
    port: int
    detail: str


class PortListeners:
    """Opens and closes ports as the table changes; retries, and reports, those that cannot be bound."""

    def __init__(self, live: Live, host: str, first: int, last: int) -> None:
        self.failures: dict[int, BindFailure] = {}
        self.on_failures: list[Callable[[], None]] = []
        self._live = live
        self._host = host
        self._pool = range(first, last + 1)
        self._servers: dict[int, asyncio.Server] = {}
        self._changed = asyncio.Event()
        live.on_table.append(self._changed.set)

    def lookup(self, request: web.BaseRequest) -> Endpoint | None:
        """The endpoint at the port that a request came to."""
        name = request.protocol.sockname
        route = self._live.table.at_port(name[1]) if isinstance(name, tuple) else None
        return self._live.endpoints.get(route.endpoint_uid) if route is not None else None

    async def run(self, front: Front) -> None:
        """Keeps the sockets as the table wants them, until cancelled; then closes them."""
        try:
            while True:
                self._changed.clear()
                await self._converge(front)
                try:
                    async with asyncio.timeout(BIND_RETRY_S if self.failures else None):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            for server in self._servers.values():
                server.close()

    async def _converge(self, front: Front) -> None:
        wanted = self._live.table.ports()
        for port in [port for port in self._servers if port not in wanted]:
            self._servers.pop(port).close()
            log.info("port %d: closed", port)
        failures: dict[int, BindFailure] = {}
        for port, route in wanted.items():
            if port in self._servers:
                continue
            if port not in self._pool:
                detail = f"outside of this proxy's ports {self._pool.start}-{self._pool.stop - 1}"
                failures[port] = BindFailure(route.endpoint_uid, port, detail)
                continue
            try:
                self._servers[port] = await listen(front, self._host, port)
                log.info("port %d: serves %s/%s", port, route.project, route.endpoint)
            except OSError as error:
                failures[port] = BindFailure(route.endpoint_uid, port, error.strerror or str(error))
        if failures != self.failures:
            for port, failure in failures.items():
                if self.failures.get(port) != failure:
                    log.warning("port %d: cannot listen: %s; trying again", port, failure.detail)
            self.failures = failures
            for callback in self.on_failures:
                callback()

    def unavailable_ports(self) -> list[int]:
        """Ports of the pool that other programs hold."""
        return [port for port in self._pool if port not in self._servers and not _can_bind(self._host, port)]


class DomainListener:
    """One port for all endpoints; the Host header's label tells them apart."""

    failures: dict[int, BindFailure]

    def __init__(self, live: Live, host: str, domain: str, port: int) -> None:
        self.failures = {}
        self.on_failures: list[Callable[[], None]] = []
        self._live = live
        self._host = host
        self._suffix = "." + domain.lower().strip(".")
        self._port = port

    def lookup(self, request: web.BaseRequest) -> Endpoint | None:
        """The endpoint whose label stands in front of the domain in Host, in any case, with any port."""
        host = request.headers.get("Host", "").lower()
        name, colon, port = host.rpartition(":")
        if colon and port.isdigit():
            host = name
        host = host.rstrip(".")
        if not host.endswith(self._suffix):
            return None
        route = self._live.table.at_label(host.removesuffix(self._suffix))
        return self._live.endpoints.get(route.endpoint_uid) if route is not None else None

    async def run(self, front: Front) -> None:
        """Serves until cancelled, and waits for the port if another program holds it."""
        server: asyncio.Server | None = None
        try:
            while server is None:
                try:
                    server = await listen(front, self._host, self._port)
                    log.info("port %d: serves *%s", self._port, self._suffix)
                except OSError as error:
                    log.warning(
                        "port %d: cannot listen: %s; trying again", self._port, error.strerror or error
                    )
                    await asyncio.sleep(BIND_RETRY_S)
            await asyncio.Event().wait()
        finally:
            if server is not None:
                server.close()

    def unavailable_ports(self) -> list[int]:
        return []


Listeners = PortListeners | DomainListener


async def listen(front: Front, host: str, port: int) -> asyncio.Server:
    """Accepts connections on a port. Raises OSError."""
    sock = _open_socket(host, port)
    try:
        return await asyncio.get_running_loop().create_server(front, sock=sock, backlog=_BACKLOG)
    except BaseException:
        sock.close()
        raise


def _can_bind(host: str, port: int) -> bool:
    try:
        with contextlib.closing(_open_socket(host, port)) as sock:
            # With SO_REUSEADDR a bind alone succeeds beside a listener on another address of the port.
            sock.listen(1)
    except OSError:
        return False
    return True


def _open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address that is a number (`--bind` is checked at start). Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEPORT: two programs that share a port in silence would each get half of the requests.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
