"""The stream to the manager: joins, takes the table's updates, reports; and keeps the table on disk.

It never gives up: whatever happens here, requests are served by the last table.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from dure.appproxy.listeners import Listeners
from dure.appproxy.live import Live
from dure.appproxy.measuring import Measuring, Seen
from dure.appproxy.scraper import Scraper
from dure.appproxy.table import Assembler, Table, TableError, dump, load
from dure.routing.v1 import routing_pb2 as pb
from dure.routing.v1 import routing_pb2_grpc as rpc
from dure.wire import identity
from dure.wire.backoff import backoff_s
from dure.wire.channel import bearer, open_channel
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut, Unauthenticated, from_rpc
from dure.wire.settings import write_file

log = logging.getLogger(__name__)

REPORT_S = 2.0
# How often it is looked whether there are measurements to report.
MEASURE_S = 1.0
SILENCE_MAX_S = 6.0
# News come in bursts, and clients that come and go must not make a flood of reports.
_REPORT_PAUSE_S = 0.01
_JOIN_TIMEOUT_S = 5.0
_RECONNECT_FIRST_S = 0.2
_RECONNECT_MAX_S = 1.0
# Of more, the rest is named as soon as the first ones have been woken.
_HELD_REPORTED_MAX = 5_000
_UNAVAILABLE_PORTS_MAX = 10_000
# Small tables change in bursts: a burst is one write.
_WRITE_PAUSE_S = 0.05


Call = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


class StreamBroken(Exception):
    """The stream has to be opened anew. The message says why."""


def read_table(path: Path) -> tuple[Table, float] | None:
    """The table on disk and when it was written (Unix seconds); None, with a log line, if there is none."""
    try:
        return load(path.read_bytes()), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except (TableError, OSError) as error:
        log.error("the route table in %s is ignored: %s", path, error)
        return None


class TableFile:
    """Keeps the newest table on disk, written in a thread, a burst of changes at once."""

    def __init__(self, path: Path, live: Live) -> None:
        self._path = path
        self._live = live
        self._written: Table | None = live.table
        self._changed = asyncio.Event()
        live.on_table.append(self._changed.set)

    async def run(self) -> None:
        """Until cancelled."""
        attempt = 0
        while True:
            await self._changed.wait()
            await asyncio.sleep(_WRITE_PAUSE_S)
            self._changed.clear()
            table = self._live.table
            if table is self._written:
                continue
            try:
                await asyncio.to_thread(_write, self._path, table)
                self._written, attempt = table, 0
            except OSError as error:
                attempt += 1
                log.error("cannot write %s: %s; a restart would begin with an older table", self._path, error)
                self._changed.set()
                await asyncio.sleep(backoff_s(attempt, first_s=1, max_s=30, jitter=0))


def _write(path: Path, table: Table) -> None:
    write_file(path, dump(table))


@dataclass(frozen=True)
class Membership:
    """What a proxy tells a manager about itself."""

    name: str
    version: str
    proxy_group: str
    public_host: str
    addressing: pb.PortPool | pb.Subdomains


class Sync:
    """The stream. `run` it for ever."""

    def __init__(
        self,
        live: Live,
        listeners: Listeners,
        scraper: Scraper,
        membership: Membership,
        *,
        manager: str,
        home: Path,
        join_token: str | None,
        clock: Callable[[], float],
    ) -> None:
        self.admin_url = ""
        self.connected = False
        self.heard_at_s: float | None = None
        self.reports = 0
        self._live = live
        self._listeners = listeners
        self._scraper = scraper
        self._measuring = Measuring()
        self._membership = membership
        self._manager = manager
        self._home = home
        self._join_token = join_token
        self._clock = clock
        self._assembler = Assembler(live.table)
        self._distrusts_table = False
        self._heard_in_stream = False
        self._report_now = asyncio.Event()
        live.on_table.append(self._report_now.set)
        live.on_drained.append(self._report_now.set)
        live.holding.on_first.append(self._report_now.set)
        listeners.on_failures.append(self._report_now.set)

    async def run(self) -> None:
        """Until cancelled. Raises DureError only if a first join is refused."""
        me = identity.load(self._home)
        attempt = 0
        last_said = ""
        while True:
            self._heard_in_stream = False
            try:
                async with open_channel(self._manager) as channel:
                    if me is None:
                        me = await self._join(channel)
                    await self._stream(channel, me)
            except (StreamBroken, ManagerUnreachable, TimedOut) as error:
                said = str(error)
            except DureError as error:
                if me is None:
                    raise
                said = f"{error} ({error.reason})"
                if isinstance(error, Unauthenticated):
                    said += f"; if the manager is a new one, remove {self._home} and join again"
            except Exception:
                # A bug must cost the stream, never the traffic.
                log.exception("the stream to the manager failed")
                said = "internal error"
            finally:
                self.connected = self._scraper.wanted = False
            attempt = 1 if self._heard_in_stream else attempt + 1
            if said != last_said:
                revision = self._live.table.revision_number
                log.warning("manager %s: %s; serving revision %d meanwhile", self._manager, said, revision)
                last_said = said
            await asyncio.sleep(
                backoff_s(attempt, first_s=_RECONNECT_FIRST_S, max_s=_RECONNECT_MAX_S, jitter=random.random())
            )

    async def _join(self, channel: grpc.aio.Channel) -> identity.Identity:
        stub = rpc.RoutingServiceStub(channel)
        try:
            joined = await stub.Join(
                pb.JoinRequest(proxy=self._membership.name),
                metadata=bearer(self._join_token or ""),
                timeout=_JOIN_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
        me = identity.Identity(joined.uid, joined.credential)
        await asyncio.to_thread(identity.save, self._home, me)
        log.info("joined manager %s as %s", self._manager, self._membership.name)
        return me

    async def _stream(self, channel: grpc.aio.Channel, me: identity.Identity) -> None:
        """One stream, until it breaks: always raises."""
        self._assembler.forget_pieces()
        unavailable = await asyncio.to_thread(self._listeners.unavailable_ports)
        call = rpc.RoutingServiceStub(channel).Connect(metadata=bearer(me.credential))
        reporter: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(SILENCE_MAX_S):
                await call.write(pb.ConnectRequest(hello=self._hello(unavailable)))
            reporter = asyncio.create_task(self._send_reports(call))
            await self._receive(call)
        except TimeoutError as error:
            raise StreamBroken(f"no word within {SILENCE_MAX_S:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
        finally:
            call.cancel()
            if reporter is not None:
                reporter.cancel()
                # What broke the stream for it broke it for `_receive` too, which has said so.
                await asyncio.gather(reporter, return_exceptions=True)

    async def _receive(self, call: Call) -> None:
        while True:
            async with asyncio.timeout(SILENCE_MAX_S):
                message = await call.read()
            if not isinstance(message, pb.ConnectResponse):
                raise StreamBroken("the manager ended the stream")
            self.connected = self._heard_in_stream = self._scraper.wanted = True
            self.heard_at_s = self._clock()
            if message.WhichOneof("message") == "update":
                self._apply(message.update)

    def _apply(self, update: pb.TableUpdate) -> None:
        try:
            table = self._assembler.apply(update)
        except TableError as error:
            # The next Hello asks for a snapshot. Meanwhile the last good table stands.
            self._distrusts_table = True
            raise StreamBroken(f"an update was refused: {error}") from error
        if table is not None:
            self._distrusts_table = False
            self._live.use(table)
            log.info("route table at revision %d: %d endpoints", table.revision_number, len(table.routes))

    async def _send_reports(self, call: Call) -> None:
        self._measuring.start(self._seen(), self._clock())
        told_s = self._clock() - REPORT_S
        measure_s = self._clock() + MEASURE_S
        while True:
            now_s = self._clock()
            news, tick = self._report_now.is_set(), now_s >= measure_s
            self._report_now.clear()
            if tick:
                measure_s = max(measure_s + MEASURE_S, now_s)
            held = list(self._live.holding.held())[:_HELD_REPORTED_MAX]
            measured = self._take(now_s) if tick else []
            if news or measured or held or now_s - told_s >= REPORT_S:
                await self._report(call, held, measured)
                while measured and (measured := self._take(now_s)):
                    # What did not fit goes out at once.
                    await self._report(call, held, measured)
                told_s = now_s
                await asyncio.sleep(_REPORT_PAUSE_S)
            try:
                async with asyncio.timeout(max(0.0, measure_s - self._clock())):
                    await self._report_now.wait()
            except TimeoutError:
                continue

    def _take(self, now_s: float) -> list[pb.EndpointMeasurement]:
        return self._measuring.take(self._seen(), self._scraper.found, now_s)

    def _seen(self) -> dict[str, Seen]:
        return {
            uid: Seen(
                endpoint.meter, tuple(replica.target.replica_uid for replica in endpoint.balancer.replicas)
            )
            for uid, endpoint in self._live.endpoints.items()
        }

    async def _report(self, call: Call, held: list[str], measured: list[pb.EndpointMeasurement]) -> None:
        report = pb.Report(
            applied_revision_number=self._live.table.revision_number,
            drained=self._live.drained(),
            bind_failures=[
                pb.BindFailure(endpoint_uid=f.endpoint_uid, port=f.port, detail=f.detail)
                for f in self._listeners.failures.values()
            ],
            unreachable_targets=self._live.unreachable(),
            measurements=measured,
            held=held,
        )
        await call.write(pb.ConnectRequest(report=report))
        self.reports += 1

    def _hello(self, unavailable: list[int]) -> pb.Hello:
        membership, table = self._membership, self._assembler.table
        hello = pb.Hello(
            protocol_version=1,
            version=membership.version,
            proxy_group=membership.proxy_group,
            public_host=membership.public_host,
            admin_url=self.admin_url,
            unavailable_ports=unavailable[:_UNAVAILABLE_PORTS_MAX],
        )
        if not self._distrusts_table:
            hello.table_id, hello.revision_number = table.id, table.revision_number
        if isinstance(membership.addressing, pb.PortPool):
            hello.port_pool.CopyFrom(membership.addressing)
        else:
            hello.subdomains.CopyFrom(membership.addressing)
        return hello
