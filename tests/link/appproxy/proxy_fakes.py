"""A manager, replicas and clients that behave, for tests of the proxy over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import uvloop
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from own_ports import free_ports

from dure.appproxy.live import Limits
from dure.appproxy.serve import Settings, serve
from dure.routing.v1 import routing_pb2 as pb
from dure.routing.v1 import routing_pb2_grpc as rpc
from dure.wire import identity
from dure.wire.channel import SERVER_OPTIONS
from dure.wire.programs import proxy_dir
from dure.wire.tokens import Claims, sign

JOIN_TOKEN = "dure_join_test"
KEY_ID = "key-1"


async def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """What a condition returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.005)
    return value


def run(test: Callable[[], Awaitable[None]], timeout_s: float = 30.0) -> None:
    """On the loop that the program runs on."""
    uvloop.run(_bounded(test, timeout_s))


def run_programs(test: Callable[[], Awaitable[None]], timeout_s: float = 30.0) -> None:
    """For tests that start programs: uvloop forks for that, which does not go well beside gRPC's threads."""
    asyncio.run(_bounded(test, timeout_s))


async def _bounded(test: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        await test()


class FakeManager(rpc.RoutingServiceServicer):
    """Keeps a route table, streams it to proxies, remembers what they say."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.table_id = "table-1"
        self.revision = 1
        self.routes: dict[str, pb.Route] = {}
        self.members: list[str] = []
        self.log: list[tuple[int, str]] = []
        self.hellos: list[pb.Hello] = []
        self.reports: list[pb.Report] = []
        self.joins = 0
        self.port = 0
        self.speaks = asyncio.Event()
        self.speaks.set()
        self.first_pieces: list[pb.TableUpdate] | None = None
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        rpc.add_RoutingServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        assert self.port
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def set(self, *routes: pb.Route) -> None:
        """Adds or replaces routes, as one change."""
        async with self._changed:
            self.revision += 1
            for route in routes:
                self.routes[route.endpoint_uid] = pb.Route.FromString(route.SerializeToString())
                self.log.append((self.revision, route.endpoint_uid))
            self._changed.notify_all()

    async def remove(self, uid: str) -> None:
        async with self._changed:
            self.revision += 1
            del self.routes[uid]
            self.log.append((self.revision, uid))
            self._changed.notify_all()

    def public_key(self) -> pb.PublicKey:
        return pb.PublicKey(id=KEY_ID, key=self.key.public_key().public_bytes_raw())

    def token(self, endpoint_uid: str, *, uid: str = "token-1", expires_in_s: float = 3600) -> str:
        now = time.time()
        claims = Claims(uid, endpoint_uid, int(now), int(now + expires_in_s))
        return sign(claims, self.key, KEY_ID)

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        if ("authorization", f"Bearer {JOIN_TOKEN}") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown join token")
        self.joins += 1
        return pb.JoinResponse(uid="proxy-uid", credential="secret")

    async def Connect(self, requests: Any, context: Any) -> AsyncIterator[pb.ConnectResponse]:
        if ("authorization", "Bearer secret") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown proxy")
        hello = (await anext(requests)).hello
        self.hellos.append(hello)
        pongs = 0

        async def listen() -> None:
            nonlocal pongs
            async for message in requests:
                self.reports.append(message.report)
                pongs += 1
                async with self._changed:
                    self._changed.notify_all()

        listener = asyncio.create_task(listen())
        try:
            if self.first_pieces is not None:
                for piece in self.first_pieces:
                    yield pb.ConnectResponse(update=piece)
                self.first_pieces = None
                return
            at = hello.revision_number
            if hello.table_id != self.table_id or at > self.revision:
                at = self.revision
                yield pb.ConnectResponse(update=self._snapshot())
            while True:
                await self.speaks.wait()
                if at < self.revision:
                    yield pb.ConnectResponse(update=self._changes(at))
                    at = self.revision
                elif pongs:
                    pongs = 0
                    yield pb.ConnectResponse(pong=pb.Pong())
                async with self._changed:
                    if at == self.revision and not pongs:
                        await self._changed.wait()
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    def _snapshot(self) -> pb.TableUpdate:
        return pb.TableUpdate(
            table_id=self.table_id,
            revision_number=self.revision,
            snapshot=True,
            complete=True,
            routes=self.routes.values(),
            keys=[self.public_key()],
            members=self.members,
        )

    def _changes(self, after: int) -> pb.TableUpdate:
        uids = {uid for revision, uid in self.log if revision > after}
        return pb.TableUpdate(
            table_id=self.table_id,
            revision_number=self.revision,
            complete=True,
            routes=[self.routes[uid] for uid in uids if uid in self.routes],
            removed=[uid for uid in uids if uid not in self.routes],
            members=self.members,
        )


def route(uid: str, port: int, *targets: pb.Target | int, public: bool = True, **more: Any) -> pb.Route:
    """An endpoint; targets by port get the uid `replica-<port>`."""
    made = [target(t) if isinstance(t, int) else t for t in targets]
    return pb.Route(
        endpoint_uid=uid,
        project="default",
        endpoint=f"name-{uid}",
        port=port,
        targets=made,
        open_to_public=public,
        **more,
    )


def target(port: int, *, draining: bool = False, weight: int = 1, revision: int = 0) -> pb.Target:
    return pb.Target(
        replica_uid=f"replica-{port}",
        host="127.0.0.1",
        port=port,
        weight=weight,
        draining=draining,
        revision=revision,
    )


@dataclass
class RunningProxy:
    """A proxy in this process."""

    task: asyncio.Task[None]
    home: Path
    admin_port: int

    async def readyz(self) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"http://127.0.0.1:{self.admin_port}/readyz") as response,
        ):
            body: dict[str, Any] = await response.json()
            return body

    async def metrics(self) -> str:
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"http://127.0.0.1:{self.admin_port}/metrics") as response,
        ):
            return await response.text()


@contextlib.asynccontextmanager
async def proxy(
    data_dir: Path,
    manager_port: int,
    ports: tuple[int, int],
    *,
    domain: str | None = None,
    port: int = 7100,
    joined: bool = True,
    **limits: Any,
) -> AsyncIterator[RunningProxy]:
    """A proxy on free ports, stopped at the end."""
    home = proxy_dir(data_dir, "proxy-1")
    home.mkdir(parents=True, exist_ok=True)
    if joined:
        identity.save(home, identity.Identity("proxy-uid", "secret"))
    settings = Settings(
        name="proxy-1",
        home=home,
        version="0",
        manager=f"127.0.0.1:{manager_port}",
        join_token=JOIN_TOKEN,
        proxy_group="default",
        bind="127.0.0.1",
        public_host="127.0.0.1",
        ports=ports,
        domain=domain,
        port=port,
        admin_bind="127.0.0.1",
        admin_port=0,
        stop_signals=(),
        limits=Limits(**limits),
    )
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[int] = loop.create_future()
    task = asyncio.create_task(
        serve(settings, lambda admin_port: loop.call_soon_threadsafe(opened.set_result, admin_port) and None)
    )
    done, _ = await asyncio.wait((task, opened), return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        task.result()
    try:
        yield RunningProxy(task, home, await opened)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@dataclass
class Bench:
    """A manager, a proxy, and one endpoint `e` at `port`."""

    manager: FakeManager
    proxy: RunningProxy
    port: int
    ports: list[int]
    http: aiohttp.ClientSession
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"

    async def serves(self, *routes: pb.Route) -> None:
        """Sets routes, and waits until the proxy has applied them and listens."""
        await self.manager.set(*routes)
        await self.applied()
        for one in routes:
            if one.port:
                await listening(one.port)

    async def reaches(self, metric: str, value: int) -> None:
        """Waits until a metric of the proxy, summed over its labels, is at least `value`."""
        deadline = time.monotonic() + 5
        while True:
            lines = [
                line for line in (await self.proxy.metrics()).split("\n") if line.startswith(metric + "{")
            ]
            if sum(float(line.rpartition(" ")[2]) for line in lines) >= value:
                return
            assert time.monotonic() < deadline, f"{metric} has not reached {value}: {lines}"
            await asyncio.sleep(0.005)

    async def applied(self) -> None:
        revision = self.manager.revision
        await until(lambda: any(r.applied_revision_number >= revision for r in self.manager.reports[-3:]))


async def listening(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at {port}"
            await asyncio.sleep(0.01)
        else:
            writer.close()
            await writer.wait_closed()
            return


@contextlib.asynccontextmanager
async def bench(data_dir: Path, **settings: Any) -> AsyncIterator[Bench]:
    ports = free_ports(3)
    manager = FakeManager()
    await manager.start()
    try:
        async with (
            proxy(data_dir, manager.port, (min(ports), max(ports)), **settings) as running,
            aiohttp.ClientSession(auto_decompress=False) as http,
        ):
            yield Bench(manager, running, ports[0], ports, http)
    finally:
        await manager.stop()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def replica(handler: Handler, port: int = 0, **settings: Any) -> AsyncIterator[int]:
    """An aiohttp server that answers everything with `handler`; its port."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=0.1, **settings)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


RawHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_replica(handler: RawHandler) -> AsyncIterator[int]:
    """A server that does with each connection what `handler` says; its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def exchange(port: int, data: bytes, *, eof: bool = False) -> bytes:
    """Sends bytes on a connection of its own; all that comes until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(5):
            return await reader.read(-1)
    finally:
        writer.close()
