"""From the hash of a secret to who it stands for."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import access, schema
from dure.manager.access import Grant, Principal
from dure.wire import errors

WHAT = {
    "user": "an API key",
    "agent": "an agent's credential",
    "proxy": "a proxy's credential",
    "join": "a join token",
}


async def look_up(session: AsyncSession, digest: str, kind: str, role: str, now_ms: int) -> Principal:
    """Raises Unauthenticated; `role` is who a join token must let in."""
    found: Principal | None
    if kind == "user":
        found = await _user(session, digest, now_ms)
    elif kind == "join":
        found = await _join(session, digest, role, now_ms)
    else:
        row: schema.Agent | schema.Proxy | None
        if kind == "agent":
            row = await session.scalar(select(schema.Agent).where(schema.Agent.credential_hash == digest))
        else:
            row = await session.scalar(select(schema.Proxy).where(schema.Proxy.credential_hash == digest))
        found = Principal(kind, row.uid, row.name) if row is not None else None
    if found is None:
        raise errors.Unauthenticated(f"this is not {WHAT[kind]} of this cluster", reason="UNKNOWN_SECRET")
    return found


async def _user(session: AsyncSession, digest: str, now_ms: int) -> Principal | None:
    key = await session.scalar(select(schema.ApiKey).where(schema.ApiKey.hash == digest))
    user = await session.get(schema.User, key.user_uid) if key is not None else None
    if key is None or user is None:
        return None
    if key.expires_ms is not None and key.expires_ms <= now_ms:
        raise errors.Unauthenticated(
            "this API key has expired; make another with `dure key create`", reason="KEY_EXPIRED"
        )
    if user.disabled:
        raise errors.Unauthenticated(
            f"user `{user.name}` is disabled; an administrator can enable it again", reason="USER_DISABLED"
        )
    rows = await session.execute(
        select(schema.Project.uid, schema.Project.name, schema.Membership.role)
        .join(schema.Membership, schema.Membership.project_uid == schema.Project.uid)
        .where(schema.Membership.user_uid == user.uid)
    )
    key_project: Grant | None = None
    if key.project_uid:
        project = await session.get(schema.Project, key.project_uid)
        key_project = Grant(key.project_uid, project.name if project is not None else "", "")
    return access.user(
        key.uid,
        user.name,
        user.uid,
        admin=user.admin,
        memberships=[Grant(uid, name, role) for uid, name, role in rows],
        cap=key.role,
        key_project=key_project,
        expires_ms=key.expires_ms,
    )


async def _join(session: AsyncSession, digest: str, role: str, now_ms: int) -> Principal | None:
    token = await session.scalar(select(schema.JoinToken).where(schema.JoinToken.hash == digest))
    if token is None:
        return None
    if token.role != role:
        raise errors.Unauthenticated(f"this join token is for {token.role}s, not for {role}s")
    if token.expires_ms <= now_ms:
        raise errors.Unauthenticated(
            "this join token has expired; make another with `dure join-token create`"
        )
    return Principal("join", token.uid, role, role=role)
