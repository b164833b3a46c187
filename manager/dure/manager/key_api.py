"""The part of UserService that keeps API keys."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import access, auth, messages, schema, scope
from dure.manager.auth import Gatekeeper
from dure.manager.store import Store, new_uid, now_ms
from dure.v1 import project_pb2
from dure.wire import errors, names, tokens
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

LABEL_MAX = 200
KEYS_PER_USER_MAX = 1_000
TTL_S_MAX = 10 * 365 * 24 * 3600
# Not set allows all that the user may do, as ADMIN does: it is a bound, not a promotion.
_CAPS = {
    project_pb2.ROLE_UNSPECIFIED: access.ADMIN,
    project_pb2.ROLE_ADMIN: access.ADMIN,
    project_pb2.ROLE_MEMBER: access.MEMBER,
    project_pb2.ROLE_VIEWER: access.VIEWER,
}
_CAP_VALUES = {
    access.ADMIN: project_pb2.ROLE_UNSPECIFIED,
    access.MEMBER: project_pb2.ROLE_MEMBER,
    access.VIEWER: project_pb2.ROLE_VIEWER,
}


class Keys:
    """Methods of UserService."""

    def __init__(self, store: Store, gatekeeper: Gatekeeper) -> None:
        self._store = store
        self._gatekeeper = gatekeeper

    async def CreateApiKey(
        self, request: project_pb2.CreateApiKeyRequest, context: Context
    ) -> project_pb2.CreateApiKeyResponse:
        now = now_ms()
        violations: list[Violation] = []
        expires_ms: int | None = None
        if request.HasField("ttl"):
            expires_ms = now + request.ttl.ToMilliseconds()
            if not now < expires_ms <= now + TTL_S_MAX * 1000:
                violations.append(Violation("ttl", "must be more than 0 and at most ten years"))
        cap = _CAPS.get(request.key.role)
        if cap is None:
            violations.append(Violation("key.role", "must be ADMIN, MEMBER, VIEWER or nothing"))
        if len(request.key.label) > LABEL_MAX:
            violations.append(Violation("key.label", f"is longer than {LABEL_MAX} characters"))
        if violations or cap is None:
            raise errors.InvalidInput.of(violations)
        secret = tokens.new_secret("key")
        async with self._store.write() as tx:
            user = await scope.user(tx.session, _owner(request.parent), "parent")
            _check_maker(expires_ms)
            project_uid = await _project_uid(tx.session, request.key.project, user)
            count = await tx.session.scalar(
                select(func.count()).select_from(schema.ApiKey).where(schema.ApiKey.user_uid == user.uid)
            )
            if (count or 0) >= KEYS_PER_USER_MAX:
                raise errors.ResourceExhausted(
                    f"user `{user.name}` has {KEYS_PER_USER_MAX} keys already; delete some: dure key list"
                )
            row = schema.ApiKey(
                uid=new_uid(),
                hash=tokens.hash_secret(secret),
                user_uid=user.uid,
                label=request.key.label,
                role=cap,
                project_uid=project_uid,
                expires_ms=expires_ms,
                created_ms=now,
            )
            tx.session.add(row)
            await tx.session.flush()
            key = await key_message(tx.session, user, row)
        auth.note(f"key {row.uid}, {cap}" + (f", project {key.project} only" if key.project else ""))
        key.secret = secret
        return project_pb2.CreateApiKeyResponse(key=key)

    async def ListApiKeys(
        self, request: project_pb2.ListApiKeysRequest, context: Context
    ) -> project_pb2.ListApiKeysResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            user = await scope.user(session, _owner(request.parent), "parent")
            rows = list(
                await session.scalars(
                    select(schema.ApiKey)
                    .where(schema.ApiKey.user_uid == user.uid, schema.ApiKey.uid > after)
                    .order_by(schema.ApiKey.uid)
                    .limit(size + 1)
                )
            )
            rows, token = scope.page(rows, size, [row.uid for row in rows])
            keys = [await key_message(session, user, row) for row in rows]
        return project_pb2.ListApiKeysResponse(keys=keys, next_page_token=token)

    async def DeleteApiKey(
        self, request: project_pb2.DeleteApiKeyRequest, context: Context
    ) -> project_pb2.DeleteApiKeyResponse:
        user_id, uid = names.parse(request.name, "users/{}/keys/{}")
        async with self._store.write() as tx:
            user = await scope.user(tx.session, names.user(user_id))
            caller = auth.current()
            if caller.limited and uid != caller.uid:
                raise errors.PermissionDenied(
                    "your key allows less than you may do, and can delete no key but itself"
                )
            row = await tx.session.get(schema.ApiKey, uid)
            if row is None or row.user_uid != user.uid:
                raise errors.NotFound(
                    f"user `{user.name}` has no key `{uid}`; `dure key list` shows the keys",
                    reason="KEY_NOT_FOUND",
                )
            if user.admin and not user.disabled:
                await _check_not_last(tx.session, row)
            auth.note(f"label {row.label}" if row.label else "no label")
            await tx.session.delete(row)
        self._gatekeeper.forget()
        return project_pb2.DeleteApiKeyResponse()


async def _check_not_last(session: AsyncSession, row: schema.ApiKey) -> None:
    """Without an administrator's whole key nobody could make another one."""
    others = await session.scalar(
        select(func.count())
        .select_from(schema.ApiKey)
        .join(schema.User, schema.User.uid == schema.ApiKey.user_uid)
        .where(
            schema.User.admin,
            schema.User.disabled.is_(False),
            schema.ApiKey.uid != row.uid,
            schema.ApiKey.role == access.ADMIN,
            schema.ApiKey.project_uid == "",
            schema.ApiKey.expires_ms.is_(None),
        )
    )
    if not others:
        raise errors.FailedPrecondition(
            "this is the last key of an administrator that does not expire; make another one first: "
            "dure key create",
            reason="LAST_ADMIN_KEY",
        )


async def key_message(session: AsyncSession, user: schema.User, row: schema.ApiKey) -> project_pb2.ApiKey:
    """A key, without its secret."""
    project = await session.get(schema.Project, row.project_uid) if row.project_uid else None
    key = project_pb2.ApiKey(
        name=names.api_key(user.name, row.uid),
        label=row.label,
        role=_CAP_VALUES[row.role],
        project=project.name if project is not None else "",
        create_time=messages.timestamp(row.created_ms),
    )
    if row.expires_ms is not None:
        key.expire_time.FromMilliseconds(row.expires_ms)
    return key


def _owner(parent: str) -> str:
    return parent or names.user(auth.current().name)


def _check_maker(expires_ms: int | None) -> None:
    """A key makes no key that can do more, or lasts longer, than itself."""
    caller = auth.current()
    if caller.limited:
        raise errors.PermissionDenied(
            "your key allows less than you may do, and can make no other; use one without role and project"
        )
    if caller.expires_ms is not None and (expires_ms is None or expires_ms > caller.expires_ms):
        raise errors.PermissionDenied(
            "your key expires, and can make no other that lasts longer; say how long it works (--expires)"
        )


async def _project_uid(session: AsyncSession, project: str, user: schema.User) -> str:
    """Of the project that a key is good for, which its user must have a role in; empty for all."""
    if not project:
        return ""
    row = await scope.project(session, names.project(project.removeprefix("projects/")), "key.project")
    if not user.admin and await session.get(schema.Membership, (user.uid, row.uid)) is None:
        raise errors.FailedPrecondition(
            f"user `{user.name}` has no role in project `{row.name}`, so the key would be good for nothing; "
            f"dure project add-member {row.name} {user.name} --role member"
        )
    return row.uid
