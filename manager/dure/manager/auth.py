"""Who calls: every method but health and reflection needs a secret, of the kind that its service takes.

One interceptor authenticates and turns errors into statuses, so that servicers raise DureErrors and no
stack trace leaves the manager. Secrets have 256 random bits and are looked up by their SHA-256.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_status import rpc_status
from sqlalchemy import select

from dure.manager import schema
from dure.manager.store import Store, now_ms
from dure.wire import errors, tokens

log = logging.getLogger(__name__)

_OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
_JOIN_METHODS = {
    "/dure.fleet.v1.FleetService/Join": "agent",
    "/dure.routing.v1.RoutingService/Join": "proxy",
}
_MEMBER_SERVICES = {"dure.fleet.v1.FleetService": "agent", "dure.routing.v1.RoutingService": "proxy"}
# Wrong secrets are not remembered, right ones for a moment: the store would be asked for each call.
_CACHE_MS = 5_000
_CACHE_MAX = 10_000


@dataclass(frozen=True)
class Principal:
    """Who calls. `kind` is `user`, `agent`, `proxy` or `join`; `name` is for logs and messages."""

    kind: str
    uid: str
    name: str
    role: str = ""


_current: contextvars.ContextVar[Principal] = contextvars.ContextVar("dure_principal")


def current() -> Principal:
    """Who makes the call that is being served."""
    return _current.get()


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Authenticates each call, and maps what servicers raise."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[str, str], tuple[int, Principal]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        service = method.split("/")[1] if method.count("/") == 2 else ""
        if handler is None or service in _OPEN_SERVICES:
            return handler
        if _JOIN_METHODS.get(method):
            kind, want = "join", _JOIN_METHODS[method]
        elif service in _MEMBER_SERVICES:
            kind, want = _MEMBER_SERVICES[service], ""
        else:
            kind, want = "user", ""
        return self._wrap(handler, method, kind, want)

    def _wrap(self, handler: Any, method: str, kind: str, want: str) -> grpc.RpcMethodHandler[Any, Any]:
        # Streaming methods are written with context.read() and context.write(), so all four are coroutines.
        inner = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                _current.set(await self.authenticate(context.invocation_metadata() or (), kind, want))
                return await inner(request, context)
            except errors.DureError as error:
                status = errors.to_status(error)
            except TimeoutError:
                status = errors.to_status(errors.TimedOut("the manager is too busy; try again"))
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception:
                reference = secrets.token_hex(4)
                log.exception("%s failed (reference %s)", method, reference)
                status = errors.to_status(
                    errors.InternalError(f"internal error; the manager's log has more under {reference}")
                )
            return await context.abort_with_status(rpc_status.to_status(status))

        factory: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        wrapped: grpc.RpcMethodHandler[Any, Any] = factory(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    async def authenticate(self, metadata: Any, kind: str, role: str = "") -> Principal:
        """Raises Unauthenticated; `role` is who a join token must let in."""
        header = next((str(value) for key, value in metadata if key == "authorization"), "")
        scheme, _, secret = header.partition(" ")
        if not secret or scheme.lower() != "bearer":
            raise errors.Unauthenticated(
                f"this call needs {_WHAT[kind]} as `authorization: Bearer <secret>`", reason="NO_SECRET"
            )
        digest = tokens.hash_secret(secret.strip())
        cached = self._known.get((kind, digest))
        if cached is not None and now_ms() < cached[0] and kind != "join":
            return cached[1]
        principal = await self._look_up(digest, kind, role)
        if len(self._known) >= _CACHE_MAX:
            self._known.clear()
        self._known[kind, digest] = (now_ms() + _CACHE_MS, principal)
        return principal

    async def _look_up(self, digest: str, kind: str, role: str) -> Principal:
        async with self._store.read() as session:
            if kind == "user":
                key = await session.scalar(select(schema.ApiKey).where(schema.ApiKey.hash == digest))
                if key is not None:
                    user = await session.get_one(schema.User, key.user_uid)
                    return Principal("user", key.uid, user.name, key.role)
            elif kind == "join":
                token = await session.scalar(select(schema.JoinToken).where(schema.JoinToken.hash == digest))
                if token is not None and token.role == role and token.expires_ms > now_ms():
                    return Principal("join", token.uid, role, role)
                if token is not None and token.role != role:
                    raise errors.Unauthenticated(f"this join token is for {token.role}s, not for {role}s")
                if token is not None:
                    raise errors.Unauthenticated(
                        "this join token has expired; make another with `dure join-token create`"
                    )
            elif kind == "agent":
                agent = await session.scalar(
                    select(schema.Agent).where(schema.Agent.credential_hash == digest)
                )
                if agent is not None:
                    return Principal(kind, agent.uid, agent.name)
            else:
                proxy = await session.scalar(
                    select(schema.Proxy).where(schema.Proxy.credential_hash == digest)
                )
                if proxy is not None:
                    return Principal(kind, proxy.uid, proxy.name)
        raise errors.Unauthenticated(f"this is not {_WHAT[kind]} of this cluster", reason="UNKNOWN_SECRET")


_WHAT = {
    "user": "an API key",
    "agent": "an agent's credential",
    "proxy": "a proxy's credential",
    "join": "a join token",
}
