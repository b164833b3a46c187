"""Forwards one request: admit, choose a replica, relay both ways, and try again where that is safe."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from dure.appproxy import headers as hygiene
from dure.appproxy import spans
from dure.appproxy.admission import Grant, Refusal, refusal
from dure.appproxy.answers import answer
from dure.appproxy.balance import Replica
from dure.appproxy.live import AllTried, Endpoint, Live, Refused, Tries
from dure.appproxy.meter import ABORTED, replica_finished
from dure.appproxy.response import Cut, End, Head, Malformed
from dure.appproxy.tunnel import Tunnel
from dure.appproxy.upload import Upload
from dure.appproxy.upstream import ConnectFailed, Connection, Pool
from dure.wire.tracing import Tracing

log = logging.getLogger(__name__)

# Requests that reached a replica and got no byte back are sent at most this often in all.
TRIES_MAX = 3
# How long a request goes on looking for a replica that accepts it, beyond the first TRIES_MAX: a replica's
# replacement may be a table update away.
SEARCH_S = 2.0
_SEARCH_PAUSE_S = 0.05
# A response in which nothing moves for this long is given up; pings of SSE and the like come more often.
STREAM_IDLE_MAX_S = 3600.0
# A client that takes nothing of its response for this long is given up.
CLIENT_STALL_MAX_S = 600.0
# What aiohttp may have buffered of a body that is not being read.
BODY_BUFFER_BYTES = 128 * 1024
_IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))

Lookup = Callable[[web.BaseRequest], Endpoint | None]


class Relayed(web.StreamResponse):
    """A response whose bytes have been written to the client already."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._keeps = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._keeps

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


@dataclass(eq=False)
class Exchange:
    """One request on its way."""

    request: web.BaseRequest
    endpoint: Endpoint
    upload: Upload
    edge: hygiene.Edge
    target: bytes
    drop_authorization: bool
    upgrade: bool
    began_s: float
    tried: Tries
    span: Any = None
    replica_uid: str = ""
    answered: bool = False
    keep_alive: bool = False
    framed: bool = False
    status: int = ABORTED


class Forwarder:
    """The handler of the data plane. `lookup` finds the endpoint that a request is for."""

    def __init__(
        self,
        live: Live,
        pool: Pool,
        lookup: Lookup,
        clock: Callable[[], float],
        wall: Callable[[], float],
        tracing: Tracing | None = None,
    ) -> None:
        self._live = live
        self._pool = pool
        self._lookup = lookup
        self._clock = clock
        self._wall = wall
        self._tracing = tracing
        self.draining = False
        live.on_gone.append(lambda replica: pool.drop((replica.target.host, replica.target.port)))

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        began_s = self._clock()
        made = secrets.token_hex(16)
        request_id = hygiene.request_id_of(request.raw_headers, made)
        endpoint: Endpoint | None = None
        exchange: Exchange | None = None
        refused: Refusal | None = None
        status = ABORTED
        self._live.active += 1
        try:
            endpoint = self._endpoint_of(request)
            endpoint.meter.in_flight += 1
            exchange = self._admit(request, endpoint, request_id, made, began_s)
            endpoint.meter.arrived += 1
            if endpoint.holds:
                # Before its body is read: what waits is to be small.
                await self._live.hold(endpoint, exchange.tried)
            await exchange.upload.read_first()
            await self._forward(exchange)
            status = exchange.status
            return Relayed(status or 502, keep_alive=exchange.keep_alive)
        except ConnectionError:
            # The client has gone; nobody is left to answer to.
            return Relayed(499, keep_alive=False)
        except Refused as error:
            refused = error.answer
            return self._answer(request, refused, request_id)
        finally:
            self._live.active -= 1
            if endpoint is None:
                self._live.unmatched += 1
            else:
                endpoint.meter.in_flight -= 1
                if exchange is not None and exchange.tried.let_go:
                    self._live.pass_on(endpoint, exchange.tried)
                if refused is None:
                    endpoint.meter.finished(status, self._clock() - began_s)
                else:
                    endpoint.meter.refused(refused.status, refused.code, admitted=exchange is not None)
                if self._tracing is not None and exchange is not None:
                    spans.end(self._tracing, exchange.span, exchange.replica_uid, status, refused)

    def _endpoint_of(self, request: web.BaseRequest) -> Endpoint:
        endpoint = self._lookup(request)
        if endpoint is not None:
            return endpoint
        if not self._live.table.id:
            raise Refused(refusal("starting", "this proxy has no route table yet; is its manager up?"))
        raise Refused(refusal("no_such_endpoint"))

    def _admit(
        self, request: web.BaseRequest, endpoint: Endpoint, request_id: str, made: str, began_s: float
    ) -> Exchange:
        limits = self._live.limits
        raw = request.raw_headers
        head_bytes = sum(len(name) + len(value) + 4 for name, value in raw) + len(request.raw_path)
        if head_bytes > limits.head_bytes_max:
            message = f"the request's head is larger than this proxy takes ({limits.head_bytes_max} bytes)"
            raise Refused(refusal("head_too_large", message, close=True))
        if request.method == "CONNECT":
            raise Refused(refusal("method_not_allowed", close=True))
        target = hygiene.origin_form(request.raw_path)
        encoding = request.headers.get("Transfer-Encoding")
        if target is None:
            raise Refused(refusal("bad_request", "the request target is not a path", close=True))
        if encoding is not None and encoding.lower() != "chunked":
            message = "the only transfer encoding that can be forwarded is `chunked`"
            raise Refused(refusal("bad_request", message, close=True))
        authorization = request.headers.getall("Authorization", ())
        grant = self._live.tokens.check(endpoint.route, authorization, self._wall())
        if isinstance(grant, Refusal):
            raise Refused(grant)
        traceparent = hygiene.traceparent_of(raw, f"00-{made}-{secrets.token_hex(8)}-00")
        span: Any = None
        upload = Upload(request, bytes_max=limits.body_bytes_max, stall_s=limits.first_byte_timeout_s)
        buffered_bytes = 0 if upload.complete else min(upload.length or BODY_BUFFER_BYTES, BODY_BUFFER_BYTES)
        if self._tracing is not None:
            span, traceparent = spans.begin(self._tracing, request, endpoint.route, request_id, traceparent)
        return Exchange(
            request=request,
            endpoint=endpoint,
            upload=upload,
            edge=hygiene.Edge(request.remote or "unknown", request.scheme, request_id, traceparent),
            target=target,
            drop_authorization=grant is Grant.TOKEN,
            upgrade=_asks_for_websocket(request),
            began_s=began_s,
            tried=Tries(size_bytes=head_bytes + buffered_bytes),
            span=span,
        )

    async def _forward(self, exchange: Exchange) -> None:
        """Relays the answer of some replica. Raises Refused if none gave one."""
        endpoint, live = exchange.endpoint, self._live
        idempotent = exchange.request.method in _IDEMPOTENT
        tried = exchange.tried
        tries = delivered = 0
        search_until_s = self._clock() + SEARCH_S
        last = refusal("upstream_unreachable")
        while True:
            try:
                replica = await live.lease(endpoint, tried)
            except AllTried:
                if self._clock() >= search_until_s:
                    raise Refused(last) from None
                await live.wait_for_change(_SEARCH_PAUSE_S)
                tried.replicas.clear()
                continue
            if tries:
                endpoint.meter.retries += 1
            tries += 1
            try:
                await self._exchange(exchange, replica, idempotent=idempotent)
                return
            except ConnectFailed as error:
                live.connect_failed(endpoint, replica)
                log.info("replica %s: cannot connect: %s", replica.target.replica_uid, error)
                last = refusal("upstream_unreachable")
                if tries >= TRIES_MAX and self._clock() >= search_until_s:
                    raise Refused(last) from None
            except _Unanswered as unanswered:
                delivered += 1
                last = refusal("upstream_closed")
                repeatable = idempotent and exchange.upload.replayable and not exchange.answered
                if not repeatable or delivered >= TRIES_MAX:
                    raise Refused(last) from None
                if unanswered.stale:
                    tried.pool = replica.target.revision
                    continue
            finally:
                live.release(endpoint, replica)
            tried.add(replica)

    async def _exchange(self, exchange: Exchange, replica: Replica, *, idempotent: bool) -> None:
        """Sends the request to one replica and relays its answer.

        Raises ConnectFailed, _Unanswered or Refused, all of them before a byte went to the client.
        """
        address = (replica.target.host, replica.target.port)
        connection = await self._pool.acquire(address, safe=idempotent and not exchange.upgrade)
        if exchange.tried.let_go:
            self._live.pass_on(exchange.endpoint, exchange.tried)
        if not connection.reused:
            self._live.connected(exchange.endpoint, replica)
        exchange.replica_uid = replica.target.replica_uid
        meter = exchange.endpoint.meter.replica(exchange.replica_uid)
        meter.in_flight += 1
        sender: asyncio.Task[None] | None = None
        try:
            connection.begin(exchange.request.method)
            async with asyncio.timeout(self._live.limits.first_byte_timeout_s) as limit:
                sender = self._send(exchange, connection, limit)
                try:
                    await connection.wait()
                except Cut as error:
                    if exchange.upload.refused is not None:
                        raise exchange.upload.refused from None
                    raise _Unanswered(stale=connection.reused) from error
            await self._relay(exchange, connection)
        except TimeoutError:
            raise Refused(refusal("upstream_timeout")) from None
        except Malformed as error:
            log.warning("replica %s: %s", replica.target.replica_uid, error)
            raise Refused(refusal("upstream_invalid")) from None
        finally:
            meter.in_flight -= 1
            replica_finished(meter, exchange.status)
            if sender is not None and not sender.done():
                sender.cancel()
                connection.abort()
                with contextlib.suppress(asyncio.CancelledError):
                    await sender
            if not exchange.upgrade or exchange.status != 101:
                self._pool.release(address, connection)
            exchange.endpoint.meter.bytes_in += exchange.upload.size_bytes

    def _send(
        self, exchange: Exchange, connection: Connection, limit: asyncio.Timeout
    ) -> asyncio.Task[None] | None:
        """Writes the head and what there is of the body; the rest goes on in a task, which is returned."""
        upload, request = exchange.upload, exchange.request
        has_body = upload.length is not None or upload.chunked
        head = hygiene.request_head(
            request.method,
            exchange.target,
            request.raw_headers,
            exchange.edge,
            drop_authorization=exchange.drop_authorization,
            body_length=upload.length if has_body and not upload.chunked else None,
            chunked=upload.chunked,
            upgrade=exchange.upgrade,
            default_host="localhost",
        )
        ready = upload.ready
        if upload.chunked and ready:
            ready = b"%x\r\n%b\r\n" % (len(ready), ready)
        connection.write(head + ready)
        if upload.complete and not upload.chunked:
            return None
        loop = asyncio.get_running_loop()

        def progress() -> None:
            # The replica's time to answer starts when it has the whole request.
            if not limit.expired():
                with contextlib.suppress(RuntimeError):
                    limit.reschedule(loop.time() + self._live.limits.first_byte_timeout_s)

        return asyncio.create_task(upload.send(connection, progress))

    async def _relay(self, exchange: Exchange, connection: Connection) -> None:
        """Passes the response on as it comes. Where it breaks off, the client's connection is broken too."""
        request = exchange.request
        chunked = False
        out: list[bytes] = []
        try:
            while True:
                async with asyncio.timeout(None if connection.ready() else STREAM_IDLE_MAX_S):
                    events = await connection.take()
                for event in events:
                    if isinstance(event, bytes):
                        exchange.endpoint.meter.bytes_out += len(event)
                        out.append(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)
                    elif isinstance(event, Head):
                        if event.status == 101:
                            await self._tunnel(exchange, connection, event)
                            return
                        if event.status == 100 or (event.status < 200 and request.version < (1, 1)):
                            continue
                        chunked = self._begin(exchange, event)
                        connection_value = self._connection_header(exchange, event)
                        out.append(
                            hygiene.response_head(
                                event,
                                request_id=exchange.edge.request_id,
                                chunked=chunked,
                                connection=connection_value,
                            )
                        )
                    else:
                        if chunked:
                            out.append(hygiene.trailer_lines(event.trailers))
                if out:
                    exchange.answered = True
                    await self._write(request, b"".join(out) if len(out) > 1 else out[0])
                    out.clear()
                if isinstance(events[-1], End):
                    return
        except (Cut, Malformed, TimeoutError) as error:
            if not exchange.answered:
                if isinstance(error, Cut):
                    raise _Unanswered(stale=False) from error
                raise
            log.warning("endpoint %s: the response broke off: %s", exchange.endpoint.route.endpoint, error)
            exchange.status = ABORTED
            exchange.keep_alive = False
            # A client that took nothing for long will not take the rest either.
            _break_client(request, framed=exchange.framed and not isinstance(error, TimeoutError))

    def _begin(self, exchange: Exchange, head: Head) -> bool:
        """Settles how the response is framed towards the client; True for chunks."""
        if head.status < 200:
            return False
        request = exchange.request
        exchange.status = head.status
        exchange.endpoint.meter.began(self._clock() - exchange.began_s)
        bodiless = request.method == "HEAD" or head.status in (204, 304)
        by_length = bodiless or head.length is not None
        exchange.framed = by_length or request.version >= (1, 1)
        exchange.keep_alive = (
            request.keep_alive and exchange.framed and exchange.upload.complete and not self.draining
        )
        return not by_length and request.version >= (1, 1)

    def _connection_header(self, exchange: Exchange, head: Head) -> bytes:
        if head.status < 200:
            return b""
        if not exchange.keep_alive:
            return b"close"
        return b"keep-alive" if exchange.request.version < (1, 1) else b""

    async def _tunnel(self, exchange: Exchange, connection: Connection, head: Head) -> None:
        if not exchange.upgrade:
            raise Malformed("it switched protocols without having been asked to")
        exchange.answered = True
        exchange.status = 101
        exchange.endpoint.meter.began(self._clock() - exchange.began_s)
        lines = hygiene.response_head(
            head, request_id=exchange.edge.request_id, chunked=False, connection=b"Upgrade"
        )
        await self._write(exchange.request, lines)
        tunnel = Tunnel(exchange.request, connection)
        try:
            await tunnel.run()
        finally:
            exchange.endpoint.meter.bytes_in += tunnel.bytes_in
            exchange.endpoint.meter.bytes_out += tunnel.bytes_out

    async def _write(self, request: web.BaseRequest, data: bytes) -> None:
        """Sends to the client, and waits while it has too much to read already."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(data)
        if request.protocol.writing_paused:
            async with asyncio.timeout(CLIENT_STALL_MAX_S):
                await request.writer.drain()

    def _answer(self, request: web.BaseRequest, refused: Refusal, request_id: str) -> web.StreamResponse:
        response = answer(refused, accept=request.headers.get("Accept", ""), request_id=request_id)
        # A client that waits for "100 Continue" may or may not send its body now: only closing is clear.
        if self.draining or (request.headers.get("Expect") and request.can_read_body):
            response.force_close()
        return response


class _Unanswered(Exception):
    """The replica took the connection and closed it without a byte; `stale` if it was an old one."""

    def __init__(self, *, stale: bool) -> None:
        super().__init__()
        self.stale = stale


def _break_client(request: web.BaseRequest, *, framed: bool) -> None:
    """Ends a client's connection in the middle of a response.

    A length or chunks show that something is missing, and what has come so far is worth having. Where the
    end of the connection is the end of the body, only a reset says that it was none.
    """
    transport = request.transport
    if transport is None:
        return
    if framed:
        transport.close()
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _asks_for_websocket(request: web.BaseRequest) -> bool:
    connection = ",".join(request.headers.getall("Connection", ())).lower()
    return (
        request.method == "GET"
        and request.version >= (1, 1)
        and not request.body_exists
        and request.headers.get("Upgrade", "").lower() == "websocket"
        and "upgrade" in (token.strip() for token in connection.split(","))
    )
