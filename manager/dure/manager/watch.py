"""Watches: a snapshot at a revision, then what changes, from a tail of the revision log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import schema, scope
from dure.manager.store import Key, Store
from dure.v1 import endpoint_pb2
from dure.wire import errors, names

BATCH_BYTES = 256 * 1024
SENDING_WAIT_S = 30.0
# A batch without news tells a client that the watch lives, and where it may resume.
PROGRESS_S = 15.0
WATCHES_MAX = 1_000


class Shown(Protocol):
    def __call__(
        self, session: AsyncSession, project: str, row: schema.Endpoint, *, replicas: bool
    ) -> Awaitable[endpoint_pb2.Endpoint]: ...


class Watcher:
    """Serves watches. A watch that is slow gets newer states later, never a queue of old ones."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = 0

    async def watch(self, request: endpoint_pb2.WatchEndpointsRequest, context: Any, shown: Shown) -> None:
        """Until the caller hangs up. Raises Compacted if `resume_after` is no longer kept."""
        if self._open >= WATCHES_MAX:
            raise errors.ResourceExhausted(f"{WATCHES_MAX} watches are open; close some")
        self._open += 1
        try:
            await self._serve(request, context, shown)
        finally:
            self._open -= 1

    async def _serve(self, request: endpoint_pb2.WatchEndpointsRequest, context: Any, shown: Shown) -> None:
        one = "/endpoints/" in request.name
        async with self._store.read() as session:
            if one:
                project, row = await scope.endpoint(session, request.name)
                only: str | None = row.uid
            else:
                project, only = await scope.project(session, request.name, "name"), None
        wake, moved = asyncio.Event(), asyncio.Event()

        def listen(_revision: int, keys: list[Key]) -> None:
            # Progress is in no revision, and a watch of a whole project, without replicas, does not show it.
            if ("progress", only) in keys:
                moved.set()
            if moved.is_set() or any(kind != "progress" for kind, _ in keys):
                wake.set()

        unlisten = self._store.listen(listen)
        try:
            await self._follow(request, context, shown, project, only, wake, moved)
        finally:
            unlisten()

    async def _follow(
        self,
        request: endpoint_pb2.WatchEndpointsRequest,
        context: Any,
        shown: Shown,
        project: schema.Project,
        only: str | None,
        wake: asyncio.Event,
        moved: asyncio.Event,
    ) -> None:
        one = only is not None
        position = request.resume_after
        if position > self._store.revision:
            raise errors.Compacted("resume_after is from another store; start over with 0")
        if position == 0:
            position = self._store.revision
            await self._send(context, project, await self._snapshot(project, only), position, shown, one)
        news = request.resume_after != 0
        while True:
            wake.clear()
            newest = self._store.revision
            uids = await self._store.changes_after(position, "endpoint")
            if uids is None:
                raise errors.Compacted(
                    "the revisions after resume_after are no longer kept; start over with 0"
                )
            uids = [uid for uid in uids if only is None or uid == only]
            if only is not None and moved.is_set() and only not in uids:
                uids.append(only)
            moved.clear()
            # One that resumes hears at once that it is up to date, even if nothing happened.
            if uids or news:
                await self._send(context, project, uids, newest, shown, one)
            position, news = newest, False
            try:
                async with asyncio.timeout(PROGRESS_S):
                    await wake.wait()
            except TimeoutError:
                await self._write(
                    context, endpoint_pb2.WatchEndpointsResponse(revision_number=position, synced=True)
                )

    async def _snapshot(self, project: schema.Project, only: str | None) -> list[str]:
        if only is not None:
            return [only]
        async with self._store.read() as session:
            return list(
                await session.scalars(
                    select(schema.Endpoint.uid)
                    .where(
                        schema.Endpoint.project_uid == project.uid,
                        schema.Endpoint.deleted_ms.is_(None),
                        schema.Endpoint.validation.is_(False),
                    )
                    .order_by(schema.Endpoint.living_name)
                )
            )

    async def _send(
        self,
        context: Any,
        project: schema.Project,
        uids: list[str],
        revision: int,
        shown: Shown,
        replicas: bool,
    ) -> None:
        """The newest state of `uids`, in batches below the size limit; the last says `synced`."""
        batch = endpoint_pb2.WatchEndpointsResponse()
        size = 0
        async with self._store.read() as session:
            for uid in uids:
                row = await session.get(schema.Endpoint, uid)
                if row is None or row.project_uid != project.uid or row.validation:
                    continue
                if row.deleted_ms is not None:
                    batch.removed.append(names.endpoint(project.name, row.name))
                    continue
                endpoint = await shown(session, project.name, row, replicas=replicas)
                size += endpoint.ByteSize()
                if size > BATCH_BYTES and batch.endpoints:
                    await self._write(context, batch)
                    batch, size = endpoint_pb2.WatchEndpointsResponse(), endpoint.ByteSize()
                batch.endpoints.append(endpoint)
        batch.revision_number, batch.synced = revision, True
        await self._write(context, batch)

    async def _write(self, context: Any, batch: endpoint_pb2.WatchEndpointsResponse) -> None:
        async with asyncio.timeout(SENDING_WAIT_S):
            await context.write(batch)
