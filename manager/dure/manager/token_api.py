"""TokenService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import auth, messages, schema, scope
from dure.manager.keys import SigningKeys
from dure.manager.store import Store, new_uid, now_ms
from dure.v1 import token_pb2, token_pb2_grpc
from dure.wire import errors, names, tokens
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

LABEL_MAX = 200
TTL_S_MAX = 10 * 365 * 24 * 3600
# Revoked ones travel in the route of their endpoint, so they are bounded with it.
TOKENS_MAX = 10_000


class TokenApi(token_pb2_grpc.TokenServiceServicer):
    """What users call to let programs in."""

    def __init__(self, store: Store, keys: SigningKeys) -> None:
        self._store = store
        self._keys = keys

    async def CreateToken(
        self, request: token_pb2.CreateTokenRequest, context: Context
    ) -> token_pb2.CreateTokenResponse:
        now_s = now_ms() // 1000
        expires_s, violations = now_s, []
        if request.HasField("ttl"):
            # A part of a second counts as a whole one: a token never ends before it was said to.
            expires_s = now_s + request.ttl.seconds + (1 if request.ttl.nanos > 0 else 0)
        elif request.HasField("expire_time"):
            expires_s = request.expire_time.seconds
        else:
            violations.append(Violation("expiry", "is required: set ttl or expire_time"))
        if not violations and not now_s < expires_s <= now_s + TTL_S_MAX:
            violations.append(Violation("expiry", "must be in the future, and within ten years"))
        if len(request.label) > LABEL_MAX:
            violations.append(Violation("label", f"is longer than {LABEL_MAX} characters"))
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            project, endpoint = await scope.endpoint(tx.session, request.parent, "parent")
            if endpoint.deleting:
                raise errors.FailedPrecondition(f"endpoint `{endpoint.name}` is being deleted")
            living = await tx.session.scalar(
                select(func.count())
                .select_from(schema.Token)
                .where(schema.Token.endpoint_uid == endpoint.uid, schema.Token.expires_s > now_s)
            )
            if (living or 0) >= TOKENS_MAX:
                raise errors.ResourceExhausted(f"endpoint `{endpoint.name}` has {TOKENS_MAX} tokens already")
            row = schema.Token(
                uid=new_uid(),
                endpoint_uid=endpoint.uid,
                label=request.label,
                key_id=self._keys.current,
                issued_s=now_s,
                expires_s=expires_s,
                revoked_ms=None,
            )
            tx.session.add(row)
            label = f" `{row.label}`" if row.label else ""
            auth.note(f"token{label} {row.uid[-6:]}")
            tx.event(endpoint.uid, "TOKEN_CREATED", f"token{label} {row.uid[-6:]} was issued")
        return token_pb2.CreateTokenResponse(token=self._shown(row, project, endpoint, secret=True))

    async def GetToken(
        self, request: token_pb2.GetTokenRequest, context: Context
    ) -> token_pb2.GetTokenResponse:
        async with self._store.read() as session:
            project, endpoint, row = await _find(session, request.name)
        return token_pb2.GetTokenResponse(token=self._shown(row, project, endpoint, secret=True))

    async def ListTokens(
        self, request: token_pb2.ListTokensRequest, context: Context
    ) -> token_pb2.ListTokensResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project, endpoint = await scope.endpoint(session, request.parent, "parent")
            query = select(schema.Token).where(schema.Token.endpoint_uid == endpoint.uid)
            if after:
                query = query.where(schema.Token.uid < after)
            rows = list(await session.scalars(query.order_by(schema.Token.uid.desc()).limit(size + 1)))
        rows, token = scope.page(rows, size, [row.uid for row in rows])
        shown = [self._shown(row, project, endpoint, secret=False) for row in rows]
        return token_pb2.ListTokensResponse(tokens=shown, next_page_token=token)

    async def RevokeToken(
        self, request: token_pb2.RevokeTokenRequest, context: Context
    ) -> token_pb2.RevokeTokenResponse:
        async with self._store.write() as tx:
            project, endpoint, row = await _find(tx.session, request.name)
            if row.revoked_ms is None:
                row.revoked_ms = now_ms()
                tx.event(endpoint.uid, "TOKEN_REVOKED", f"token {row.uid[-6:]} was revoked")
                # The route carries revocations.
                tx.touch("endpoint", endpoint.uid)
        return token_pb2.RevokeTokenResponse(token=self._shown(row, project, endpoint, secret=False))

    def _shown(
        self, row: schema.Token, project: schema.Project, endpoint: schema.Endpoint, *, secret: bool
    ) -> token_pb2.Token:
        status = token_pb2.TOKEN_STATUS_ACTIVE
        if row.revoked_ms is not None:
            status = token_pb2.TOKEN_STATUS_REVOKED
        elif row.expires_s * 1000 <= now_ms():
            status = token_pb2.TOKEN_STATUS_EXPIRED
        message = token_pb2.Token(
            name=names.token(project.name, endpoint.name, row.uid),
            uid=row.uid,
            label=row.label,
            create_time=messages.timestamp(row.issued_s * 1000),
            expire_time=messages.timestamp(row.expires_s * 1000),
            status=status,
        )
        if secret:
            claims = tokens.Claims(row.uid, row.endpoint_uid, row.issued_s, row.expires_s)
            message.secret = self._keys.sign(claims, row.key_id)
        return message


async def _find(session: AsyncSession, name: str) -> tuple[schema.Project, schema.Endpoint, schema.Token]:
    project_id, endpoint_id, uid = names.parse(name, "projects/{}/endpoints/{}/tokens/{}")
    project, endpoint = await scope.endpoint(session, names.endpoint(project_id, endpoint_id))
    row = await session.get(schema.Token, uid)
    if row is None or row.endpoint_uid != endpoint.uid:
        raise errors.NotFound(f"endpoint `{endpoint.name}` has no token `{uid}`", reason="TOKEN_NOT_FOUND")
    return project, endpoint, row
