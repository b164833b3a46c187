"""Joining: a join token is exchanged for an identity that lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sqlalchemy import select

from dure.manager import schema
from dure.manager.store import Store, new_uid, now_ms
from dure.wire import errors, names, tokens


async def join(
    store: Store, kind: Literal["agent", "proxy"], name: str, alive: Callable[[str], bool]
) -> tuple[str, str]:
    """Uid and credential of a new member.

    A name that is known gets a new credential and keeps its uid (a node whose disk was replaced), unless
    the member that has it is connected: raises AlreadyExists.
    """
    violation = names.check_id(name, names.MEMBER_ID, kind)
    if violation is not None:
        raise errors.InvalidInput.of([violation])
    credential = tokens.new_secret(kind)
    digest = tokens.hash_secret(credential)
    async with store.write() as tx:
        row: schema.Agent | schema.Proxy | None
        if kind == "agent":
            row = await tx.session.scalar(select(schema.Agent).where(schema.Agent.name == name))
        else:
            row = await tx.session.scalar(select(schema.Proxy).where(schema.Proxy.name == name))
        if row is not None and alive(row.uid):
            raise errors.AlreadyExists(
                f"{kind} `{name}` is connected already; choose another name with --name",
                reason="NAME_IN_USE",
            )
        if row is not None:
            row.credential_hash = digest
            return row.uid, credential
        common = {"uid": new_uid(), "name": name, "credential_hash": digest, "joined_ms": now_ms()}
        if kind == "agent":
            row = schema.Agent(**common, resource_group="", hello=b"")
        else:
            row = schema.Proxy(**common, proxy_group="", hello=b"", hello_ms=0)
        tx.session.add(row)
        return row.uid, credential
