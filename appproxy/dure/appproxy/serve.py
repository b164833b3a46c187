"""Puts the parts together and runs them until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from dure.appproxy.admin import make_admin
from dure.appproxy.forward import Forwarder
from dure.appproxy.front import Front
from dure.appproxy.listeners import DomainListener, Listeners, PortListeners
from dure.appproxy.live import Limits, Live
from dure.appproxy.scraper import Scraper
from dure.appproxy.sync import Membership, Sync, TableFile, read_table
from dure.appproxy.upstream import Pool
from dure.routing.v1 import routing_pb2 as pb
from dure.wire import tracing
from dure.wire.errors import FailedPrecondition

log = logging.getLogger(__name__)

DRAIN_S = 10.0


@dataclass(frozen=True)
class Settings:
    """All that a proxy is started with."""

    name: str
    home: Path
    version: str
    manager: str
    join_token: str | None
    proxy_group: str
    bind: str
    public_host: str
    ports: tuple[int, int]
    domain: str | None
    port: int
    admin_bind: str
    admin_port: int
    stop_signals: tuple[signal.Signals, ...]
    limits: Limits


async def serve(settings: Settings, record: Callable[[int], None]) -> None:
    """Serves until a stop signal, then drains; a second signal ends it at once.

    `record` is called with the admin port once that is open. Raises DureError if it cannot start.
    """
    clock = asyncio.get_running_loop().time
    stop, stop_now = _watch_signals(settings.stop_signals)
    live, pool = Live(settings.limits, clock), Pool()
    traces = tracing.set_up("proxy", settings.name)
    table_path = settings.home / "table.pb"
    found = await asyncio.to_thread(read_table, table_path)
    if found is not None:
        live.use(found[0])
        log.info("serving revision %d from %s", live.table.revision_number, table_path)
    listeners: Listeners
    addressing: pb.PortPool | pb.Subdomains
    if settings.domain is not None:
        listeners = DomainListener(live, settings.bind, settings.domain, settings.port)
        addressing = pb.Subdomains(domain=settings.domain, port=settings.port)
    else:
        listeners = PortListeners(live, settings.bind, *settings.ports)
        addressing = pb.PortPool(first=settings.ports[0], last=settings.ports[1])
    front = Front(
        Forwarder(live, pool, listeners.lookup, clock, time.time, traces),
        head_bytes_max=settings.limits.head_bytes_max,
    )
    table_file = TableFile(table_path, live)
    membership = Membership(
        name=settings.name,
        version=settings.version,
        proxy_group=settings.proxy_group,
        public_host=settings.public_host,
        addressing=addressing,
    )
    scraper = Scraper(live, settings.name, clock)
    sync = Sync(
        live,
        listeners,
        scraper,
        membership,
        manager=settings.manager,
        home=settings.home,
        join_token=settings.join_token,
        clock=clock,
    )
    disk_age_s = max(0.0, time.time() - found[1]) if found is not None else None
    admin = web.AppRunner(make_admin(live, pool, sync, scraper, clock, disk_age_s), access_log=None)
    await admin.setup()
    tasks: list[asyncio.Task[object]] = []
    try:
        sync.admin_url = await _open_admin(admin, settings)
        await asyncio.to_thread(record, int(sync.admin_url.rpartition(":")[2]))
        listening: asyncio.Task[object] = asyncio.create_task(listeners.run(front))
        stopping: asyncio.Task[object] = asyncio.create_task(stop.wait())
        tasks = [listening, stopping]
        tasks += [
            asyncio.create_task(run) for run in (pool.sweep(), table_file.run(), scraper.run(), sync.run())
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
        log.info("stopping: %d requests under way", live.active)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await front.drain(DRAIN_S, stop_now)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await front.shutdown(timeout=0.2)
        pool.close()
        await admin.cleanup()
        if traces is not None:
            await traces.close()


async def _open_admin(runner: web.AppRunner, settings: Settings) -> str:
    site = web.TCPSite(runner, settings.admin_bind, settings.admin_port)
    try:
        await site.start()
    except OSError as error:
        raise FailedPrecondition(
            f"the admin port {settings.admin_bind}:{settings.admin_port} cannot be opened "
            f"({error.strerror or error}): stop what holds it, or choose another with --admin-port (0: any)"
        ) from error
    port = runner.addresses[0][1]
    host = settings.admin_bind
    if host in ("0.0.0.0", "::"):
        host = settings.public_host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _watch_signals(signals: tuple[signal.Signals, ...]) -> tuple[asyncio.Event, asyncio.Event]:
    """Events that are set by the first and the second stop signal."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, stop_now
