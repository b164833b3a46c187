"""From resource names to living rows, and pages of them.

Whoever turns a name into a row comes by here, so here it is asked whether the caller may: see `auth.enter`.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import auth, schema
from dure.wire import errors, names
from dure.wire.errors import Violation

PAGE_DEFAULT, PAGE_MAX = 100, 1000


async def project(session: AsyncSession, name: str, field: str = "parent") -> schema.Project:
    """Raises PermissionDenied, and NotFound to who may know."""
    (project_id,) = names.parse(name, "projects/{}", field)
    return await _project(session, project_id, name)


async def _project(session: AsyncSession, project_id: str, name: str) -> schema.Project:
    row = await session.scalar(select(schema.Project).where(schema.Project.name == project_id))
    auth.enter(row.uid if row is not None else None, project_id, name)
    if row is None:
        raise errors.NotFound(
            f"no project `{project_id}`; `dure project list` shows all", reason="PROJECT_NOT_FOUND"
        )
    return row


async def user(session: AsyncSession, name: str, field: str = "name") -> schema.User:
    """Raises PermissionDenied, and NotFound to who may know."""
    (user_id,) = names.parse(name, "users/{}", field)
    row = await session.scalar(select(schema.User).where(schema.User.name == user_id))
    auth.enter_user(row.uid if row is not None else None, user_id)
    if row is None:
        raise errors.NotFound(f"no user `{user_id}`; `dure user list` shows all", reason="USER_NOT_FOUND")
    return row


async def endpoint(
    session: AsyncSession, name: str, field: str = "name"
) -> tuple[schema.Project, schema.Endpoint]:
    """Raises PermissionDenied and NotFound."""
    project_id, endpoint_id = names.parse(name, "projects/{}/endpoints/{}", field)
    owner = await _project(session, project_id, name)
    row = await session.scalar(
        select(schema.Endpoint).where(
            schema.Endpoint.project_uid == owner.uid, schema.Endpoint.living_name == endpoint_id
        )
    )
    if row is None:
        raise errors.NotFound(
            f"no endpoint `{endpoint_id}` in project `{project_id}`", reason="ENDPOINT_NOT_FOUND"
        )
    return owner, row


async def folder(
    session: AsyncSession, name: str, field: str = "name"
) -> tuple[schema.Project, schema.Folder]:
    """Raises PermissionDenied and NotFound."""
    project_id, folder_id = names.parse(name, "projects/{}/folders/{}", field)
    owner = await _project(session, project_id, name)
    row = await session.scalar(
        select(schema.Folder).where(schema.Folder.project_uid == owner.uid, schema.Folder.name == folder_id)
    )
    if row is None:
        raise errors.NotFound(f"no folder `{folder_id}` in project `{project_id}`", reason="FOLDER_NOT_FOUND")
    return owner, row


def page_size(asked: int) -> int:
    if asked < 0 or asked > PAGE_MAX:
        raise errors.InvalidInput.of([Violation("page_size", f"must be from 0 to {PAGE_MAX}")])
    return asked or PAGE_DEFAULT


def read_page_token(token: str) -> str:
    """The key after which the page begins, empty for the first."""
    if not token:
        return ""
    try:
        after = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))["after"]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.InvalidInput.of(
            [Violation("page_token", "is not one that a page before gave")]
        ) from error
    return str(after)


def page(items: list[Any], size: int, keys: list[str]) -> tuple[list[Any], str]:
    """The first `size` of up to size + 1 items, and the token of the next page if there is one more."""
    if len(items) <= size:
        return items, ""
    after = json.dumps({"after": keys[size - 1]}).encode()
    return items[:size], base64.urlsafe_b64encode(after).decode("ascii")
