"""Permanent addresses: a port of the proxy group's pool, or a host label, for an endpoint's whole life."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import schema
from dure.manager.routes import host_label
from dure.manager.store import Tx, now_ms
from dure.routing.v1 import routing_pb2
from dure.wire.errors import ResourceExhausted

# A table on the disk of a proxy that was away must not lead callers to another tenant.
REST_MS = 10 * 60 * 1000


async def assign_address(tx: Tx, row: schema.Endpoint, *, required: bool = False) -> None:
    """Gives an endpoint its address as soon as its proxy group has said what it offers.

    Raises ResourceExhausted, if `required`, when the group has no port left.
    """
    hello = await _declaration(tx.session, row.proxy_group)
    if hello is None or row.deleting:
        return
    if hello.HasField("port_pool") and row.port is None:
        row.port = await _free_port(tx.session, row.proxy_group, hello)
        if row.port is None:
            if required:
                pool = f"{hello.port_pool.first}-{hello.port_pool.last}"
                raise ResourceExhausted(
                    f"every port of {pool} of proxy group `{row.proxy_group}` is taken, or rests for 10 "
                    "minutes after a deletion; start the proxies with a wider --ports",
                    reason="PORT_POOL_EXHAUSTED",
                )
            return
    address = _address(row, hello)
    if row.address != address:
        row.address = address
        tx.touch("endpoint", row.uid)


async def release_address(tx: Tx, row: schema.Endpoint) -> None:
    """The port rests before it is given out again."""
    await tx.session.execute(delete(schema.RestingPort).where(schema.RestingPort.until_ms < now_ms()))
    if row.port is not None:
        await tx.session.merge(
            schema.RestingPort(proxy_group=row.proxy_group, port=row.port, until_ms=now_ms() + REST_MS)
        )
        row.port = None


async def _declaration(session: AsyncSession, proxy_group: str) -> routing_pb2.Hello | None:
    row = await session.scalar(
        select(schema.Proxy)
        .where(schema.Proxy.proxy_group == proxy_group, schema.Proxy.hello != b"")
        .order_by(schema.Proxy.hello_ms.desc())
        .limit(1)
    )
    return routing_pb2.Hello.FromString(row.hello) if row is not None else None


async def _free_port(session: AsyncSession, proxy_group: str, hello: routing_pb2.Hello) -> int | None:
    used = set(
        await session.scalars(
            select(schema.Endpoint.port).where(
                schema.Endpoint.proxy_group == proxy_group, schema.Endpoint.port.is_not(None)
            )
        )
    )
    resting = set(
        await session.scalars(
            select(schema.RestingPort.port).where(
                schema.RestingPort.proxy_group == proxy_group, schema.RestingPort.until_ms > now_ms()
            )
        )
    )
    taken = used | resting | set(hello.unavailable_ports)
    pool = range(hello.port_pool.first, hello.port_pool.last + 1)
    return next((port for port in pool if port not in taken), None)


def _address(row: schema.Endpoint, hello: routing_pb2.Hello) -> str:
    scheme, default_port = ("https", 443) if hello.https else ("http", 80)
    if hello.HasField("subdomains"):
        host, port = f"{host_label(row.name, row.uid)}.{hello.subdomains.domain}", hello.subdomains.port
    else:
        host, port = hello.public_host, row.port or 0
        if ":" in host:
            host = f"[{host}]"
    return f"{scheme}://{host}" + ("" if port == default_port else f":{port}")
