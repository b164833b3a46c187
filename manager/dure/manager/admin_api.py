"""AdminService."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio
from sqlalchemy import select

import dure.wire
from dure.manager import auth, messages, schema
from dure.manager.fleet import Fleet
from dure.manager.hub import Hub
from dure.manager.model import AgentStatus
from dure.manager.store import Store, new_uid, now_ms
from dure.routing.v1 import routing_pb2
from dure.v1 import admin_pb2, admin_pb2_grpc
from dure.wire import errors, names, tokens
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

JOIN_TTL_S_DEFAULT, JOIN_TTL_S_MAX = 3600, 30 * 24 * 3600
_ROLES = {admin_pb2.JOIN_ROLE_AGENT: "agent", admin_pb2.JOIN_ROLE_PROXY: "proxy"}


class AdminApi(admin_pb2_grpc.AdminServiceServicer):
    """What those call who run the cluster."""

    def __init__(self, store: Store, fleet: Fleet, hub: Hub) -> None:
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._started_s = time.monotonic()

    async def GetCluster(
        self, request: admin_pb2.GetClusterRequest, context: Context
    ) -> admin_pb2.GetClusterResponse:
        statuses = self._fleet.statuses()
        response = admin_pb2.GetClusterResponse(
            version=dure.wire.VERSION,
            revision_number=self._store.revision,
            route_revision_number=self._hub.revision,
            agents=len(statuses),
            agents_alive=sum(1 for status in statuses.values() if status is AgentStatus.ALIVE),
        )
        response.uptime.FromMilliseconds(int((time.monotonic() - self._started_s) * 1000))
        async with self._store.read() as session:
            rows = list(await session.scalars(select(schema.Proxy).order_by(schema.Proxy.name).limit(1000)))
        for row in rows:
            hello = routing_pb2.Hello.FromString(row.hello)
            live = self._hub.proxies.get(row.uid)
            pool = hello.port_pool
            response.proxies.add(
                name=names.proxy(row.name),
                proxy_group=row.proxy_group,
                connected=live is not None,
                applied_revision_number=live.applied if live is not None else 0,
                port_pool=f"{pool.first}-{pool.last}" if hello.HasField("port_pool") else "",
                public_host=hello.public_host,
                admin_url=hello.admin_url,
                unreachable_targets=live.unreachable if live is not None else (),
            )
        return response

    async def CreateJoinToken(
        self, request: admin_pb2.CreateJoinTokenRequest, context: Context
    ) -> admin_pb2.CreateJoinTokenResponse:
        violations = []
        role = _ROLES.get(request.role)
        if role is None:
            violations.append(Violation("role", "is required: AGENT or PROXY"))
        ttl_s = request.ttl.seconds if request.HasField("ttl") else JOIN_TTL_S_DEFAULT
        if not 0 < ttl_s <= JOIN_TTL_S_MAX:
            violations.append(Violation("ttl", "must be more than 0 and at most 30 days"))
        if violations or role is None:
            raise errors.InvalidInput.of(violations)
        secret = tokens.new_secret(f"join_{role}")
        expires_ms = now_ms() + ttl_s * 1000
        auth.note(f"for a{'n agent' if role == 'agent' else ' proxy'}, {ttl_s} s")
        async with self._store.write() as tx:
            tx.session.add(
                schema.JoinToken(
                    uid=new_uid(), hash=tokens.hash_secret(secret), role=role, expires_ms=expires_ms
                )
            )
        return admin_pb2.CreateJoinTokenResponse(token=secret, expire_time=messages.timestamp(expires_ms))
