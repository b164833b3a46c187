"""RuntimeService, and the runtimes that come with Dure."""

from __future__ import annotations

from importlib import resources
from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import checks, messages, runtimes, schema, scope
from dure.manager.store import Store, now_ms
from dure.v1 import catalog_pb2, catalog_pb2_grpc
from dure.wire import errors, names

Context = grpc.aio.ServicerContext[Any, Any]

RUNTIMES_MAX = 1000
_UPDATABLE = (
    "title", "start_command", "port", "health_check", "reads_model_definition", "environ", "resource_slots",
    "flags", "gpu_fraction_flag", "serial_start",
)  # fmt: skip


async def store_seed(store: Store) -> None:
    """Writes the runtimes that come with Dure; one that an administrator has made under such a name stays."""
    text = resources.files("dure.manager").joinpath("runtimes.toml").read_text(encoding="utf-8")
    async with store.write() as tx:
        for runtime in runtimes.seed(text):
            name = runtime.name.rsplit("/", 1)[-1]
            row = await tx.session.get(schema.Runtime, name)
            if row is None:
                tx.session.add(_row(name, runtime, builtin=True))
            elif row.builtin:
                row.content = _content(runtime)


class RuntimeApi(catalog_pb2_grpc.RuntimeServiceServicer):
    """What administrators call to keep runtimes, and everybody to see them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def CreateRuntime(
        self, request: catalog_pb2.CreateRuntimeRequest, context: Context
    ) -> catalog_pb2.CreateRuntimeResponse:
        violations = runtimes.check(request.runtime, request.runtime_id)
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            if await tx.session.get(schema.Runtime, request.runtime_id) is not None:
                raise errors.AlreadyExists(
                    f"there is a runtime `{request.runtime_id}` already", reason="RUNTIME_EXISTS"
                )
            existing = await tx.session.scalars(select(schema.Runtime.name).limit(RUNTIMES_MAX))
            if len(list(existing)) >= RUNTIMES_MAX:
                raise errors.ResourceExhausted(f"there are {RUNTIMES_MAX} runtimes already; delete some")
            row = _row(request.runtime_id, request.runtime, builtin=False)
            tx.session.add(row)
        return catalog_pb2.CreateRuntimeResponse(runtime=_shown(row))

    async def GetRuntime(
        self, request: catalog_pb2.GetRuntimeRequest, context: Context
    ) -> catalog_pb2.GetRuntimeResponse:
        async with self._store.read() as session:
            return catalog_pb2.GetRuntimeResponse(runtime=_shown(await _find(session, request.name)))

    async def ListRuntimes(
        self, request: catalog_pb2.ListRuntimesRequest, context: Context
    ) -> catalog_pb2.ListRuntimesResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            query = select(schema.Runtime).where(schema.Runtime.name > after)
            rows = list(await session.scalars(query.order_by(schema.Runtime.name).limit(size + 1)))
        rows, token = scope.page(rows, size, [row.name for row in rows])
        return catalog_pb2.ListRuntimesResponse(runtimes=[_shown(row) for row in rows], next_page_token=token)

    async def UpdateRuntime(
        self, request: catalog_pb2.UpdateRuntimeRequest, context: Context
    ) -> catalog_pb2.UpdateRuntimeResponse:
        paths = list(request.update_mask.paths)
        violations = checks.mask(paths, _UPDATABLE)
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            row = await _find(tx.session, request.runtime.name, "runtime.name")
            _not_builtin(row, "changed")
            changed = catalog_pb2.Runtime.FromString(row.content)
            for path in paths:
                changed.ClearField(path)  # type: ignore[arg-type]
            wanted = catalog_pb2.Runtime()
            wanted.CopyFrom(request.runtime)
            for described, _ in request.runtime.ListFields():
                if described.name not in paths:
                    wanted.ClearField(described.name)  # type: ignore[arg-type]
            changed.MergeFrom(wanted)
            violations = runtimes.check(changed, row.name)
            if violations:
                raise errors.InvalidInput.of(violations)
            row.content = _content(changed)
        return catalog_pb2.UpdateRuntimeResponse(runtime=_shown(row))

    async def DeleteRuntime(
        self, request: catalog_pb2.DeleteRuntimeRequest, context: Context
    ) -> catalog_pb2.DeleteRuntimeResponse:
        async with self._store.write() as tx:
            row = await _find(tx.session, request.name)
            _not_builtin(row, "deleted")
            await tx.session.delete(row)
        return catalog_pb2.DeleteRuntimeResponse()


async def _find(session: AsyncSession, name: str, field: str = "name") -> schema.Runtime:
    (runtime_id,) = names.parse(name, "runtimes/{}", field)
    row = await session.get(schema.Runtime, runtime_id)
    if row is None:
        raise errors.NotFound(f"no runtime `{runtime_id}`", reason="RUNTIME_NOT_FOUND")
    return row


def _not_builtin(row: schema.Runtime, what: str) -> None:
    if row.builtin:
        raise errors.FailedPrecondition(
            f"runtime `{row.name}` comes with Dure and cannot be {what}; make one of your own from it: "
            f"dure runtime get {row.name} -o yaml > FILE, then dure runtime create NAME -f FILE",
            reason="RUNTIME_BUILTIN",
        )


def _row(name: str, runtime: catalog_pb2.Runtime, *, builtin: bool) -> schema.Runtime:
    content = catalog_pb2.Runtime()
    content.CopyFrom(runtime)
    content.name = f"runtimes/{name}"
    return schema.Runtime(name=name, content=_content(content), builtin=builtin, created_ms=now_ms())


def _content(runtime: catalog_pb2.Runtime) -> bytes:
    """Without what the row itself says."""
    content = catalog_pb2.Runtime()
    content.CopyFrom(runtime)
    content.ClearField("builtin")
    content.ClearField("create_time")
    return content.SerializeToString(deterministic=True)


def _shown(row: schema.Runtime) -> catalog_pb2.Runtime:
    runtime = catalog_pb2.Runtime.FromString(row.content)
    runtime.builtin = row.builtin
    runtime.create_time.CopyFrom(messages.timestamp(row.created_ms))
    return runtime
