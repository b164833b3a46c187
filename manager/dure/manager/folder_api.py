"""FolderService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from dure.manager import auth, messages, schema, scope
from dure.manager.definitions import check_folder
from dure.manager.folders import FileFacts, Folders
from dure.manager.runtime_api import RUNTIMES_MAX
from dure.manager.store import Store, new_uid, now_ms
from dure.v1 import folder_pb2, folder_pb2_grpc
from dure.wire import errors, names
from dure.wire.channel import PIECE_BYTES, PIECE_BYTES_MAX
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

# A caller that sends nothing, or takes nothing, for this long is gone.
PIECE_WAIT_S = 60.0


class FolderApi(folder_pb2_grpc.FolderServiceServicer):
    """What users call to keep folders."""

    def __init__(self, store: Store, folders: Folders) -> None:
        self._store = store
        self._folders = folders

    async def CreateFolder(
        self, request: folder_pb2.CreateFolderRequest, context: Context
    ) -> folder_pb2.CreateFolderResponse:
        violations = []
        wrong = names.check_id(request.folder_id, names.FOLDER_ID, "folder_id")
        violations += [wrong] if wrong is not None else []
        usages = {value: name.removeprefix("FOLDER_USAGE_") for name, value in folder_pb2.FolderUsage.items()}
        if not request.folder.usage or request.folder.usage not in usages:
            violations.append(Violation("folder.usage", "is required: MODEL, DATA or GENERAL"))
        if violations:
            raise errors.InvalidInput.of(violations)
        try:
            async with self._store.write() as tx:
                project = await scope.project(tx.session, request.parent)
                row = schema.Folder(
                    uid=new_uid(),
                    project_uid=project.uid,
                    name=request.folder_id,
                    usage=usages[request.folder.usage],
                    created_ms=now_ms(),
                )
                tx.session.add(row)
                tx.touch("folder", row.uid)
                await tx.session.flush()
                await self._folders.create(row.uid)
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"there is a folder `{request.folder_id}` already", reason="FOLDER_EXISTS"
            ) from error
        return folder_pb2.CreateFolderResponse(folder=messages.folder(row, project.name, 0, 0))

    async def GetFolder(
        self, request: folder_pb2.GetFolderRequest, context: Context
    ) -> folder_pb2.GetFolderResponse:
        async with self._store.read() as session:
            project, row = await scope.folder(session, request.name)
        return folder_pb2.GetFolderResponse(folder=await self._shown(row, project.name))

    async def ListFolders(
        self, request: folder_pb2.ListFoldersRequest, context: Context
    ) -> folder_pb2.ListFoldersResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            rows = list(
                await session.scalars(
                    select(schema.Folder)
                    .where(schema.Folder.project_uid == project.uid, schema.Folder.name > after)
                    .order_by(schema.Folder.name)
                    .limit(size + 1)
                )
            )
        rows, token = scope.page(rows, size, [row.name for row in rows])
        folders = [await self._shown(row, project.name) for row in rows]
        return folder_pb2.ListFoldersResponse(folders=folders, next_page_token=token)

    async def DeleteFolder(
        self, request: folder_pb2.DeleteFolderRequest, context: Context
    ) -> folder_pb2.DeleteFolderResponse:
        async with self._store.write() as tx:
            _, row = await scope.folder(tx.session, request.name)
            users = list(
                await tx.session.scalars(
                    select(schema.Endpoint.name)
                    .join(schema.RevisionFolder, schema.RevisionFolder.endpoint_uid == schema.Endpoint.uid)
                    .where(schema.RevisionFolder.folder_uid == row.uid, schema.Endpoint.deleted_ms.is_(None))
                    .distinct()
                    .limit(6)
                )
            )
            if users:
                shown = ", ".join(f"`{name}`" for name in users[:5]) + (" ..." if len(users) > 5 else "")
                raise errors.FailedPrecondition(
                    f"folder `{row.name}` is mounted by {shown}; delete the endpoint first",
                    reason="FOLDER_IN_USE",
                )
            await tx.session.delete(row)
            tx.touch("folder", row.uid)
        await self._folders.remove(row.uid)
        return folder_pb2.DeleteFolderResponse()

    async def ListFiles(
        self, request: folder_pb2.ListFilesRequest, context: Context
    ) -> folder_pb2.ListFilesResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        uid = await self._uid(request.parent, "parent")
        found = [facts for facts in await self._folders.files(uid) if facts.path > after][: size + 1]
        found, token = scope.page(found, size, [facts.path for facts in found])
        return folder_pb2.ListFilesResponse(files=[_file(facts) for facts in found], next_page_token=token)

    async def UploadFile(self, _requests: Any, context: Context) -> folder_pb2.UploadFileResponse:
        first = await _next(context)
        if first is None or not first.HasField("header"):
            raise errors.InvalidInput.of([Violation("header", "the first piece must carry the header")])
        header = first.header
        uid = await self._uid(header.folder, "header.folder")
        auth.note(header.path[:200])
        facts = await self._folders.write(
            uid, header.path, header.size_bytes, header.sha256, header.mode, _pieces(context)
        )
        return folder_pb2.UploadFileResponse(file=_file(facts))

    async def DownloadFile(  # type: ignore[override]
        self, request: folder_pb2.DownloadFileRequest, context: Context
    ) -> None:
        uid = await self._uid(request.folder, "folder")
        facts = await self._folders.facts(uid, request.path)
        await _write(context, folder_pb2.DownloadFileResponse(file=_file(facts)))
        async for data in self._folders.read(uid, request.path, request.offset, PIECE_BYTES):
            await _write(context, folder_pb2.DownloadFileResponse(data=data))

    async def DeleteFile(
        self, request: folder_pb2.DeleteFileRequest, context: Context
    ) -> folder_pb2.DeleteFileResponse:
        uid = await self._uid(request.folder, "folder")
        auth.note(request.path[:200])
        await self._folders.delete(uid, request.path, recursive=request.recursive)
        return folder_pb2.DeleteFileResponse()

    async def CheckFolder(
        self, request: folder_pb2.CheckFolderRequest, context: Context
    ) -> folder_pb2.CheckFolderResponse:
        async with self._store.read() as session:
            _, row = await scope.folder(session, request.name)
            known = list(await session.scalars(select(schema.Runtime.name).limit(RUNTIMES_MAX)))
        if row.usage != "MODEL":
            used = f"folder `{row.name}` has usage {row.usage.lower()}; only model folders have definitions"
            raise errors.InvalidInput.of([Violation("name", used)])
        report = await check_folder(self._folders, row, known, request.model_definition_path)
        problems = [messages.file_problem(problem) for problem in report.problems]
        return folder_pb2.CheckFolderResponse(problems=problems, files=report.files)

    async def _uid(self, name: str, field: str) -> str:
        async with self._store.read() as session:
            _, row = await scope.folder(session, name, field)
        return row.uid

    async def _shown(self, row: schema.Folder, project: str) -> folder_pb2.Folder:
        found = await self._folders.files(row.uid)
        return messages.folder(row, project, len(found), sum(facts.size_bytes for facts in found))


async def _next(context: Context) -> folder_pb2.UploadFileRequest | None:
    async with asyncio.timeout(PIECE_WAIT_S):
        message = await context.read()
    return None if message is grpc.aio.EOF else message


async def _pieces(context: Context) -> AsyncIterator[bytes]:
    while (message := await _next(context)) is not None:
        if not message.HasField("data") or len(message.data) > PIECE_BYTES_MAX:
            raise errors.InvalidInput.of(
                [Violation("data", f"every piece after the first carries at most {PIECE_BYTES_MAX} bytes")]
            )
        yield message.data


async def _write(context: Context, message: folder_pb2.DownloadFileResponse) -> None:
    async with asyncio.timeout(PIECE_WAIT_S):
        await context.write(message)


def _file(facts: FileFacts) -> folder_pb2.File:
    return folder_pb2.File(
        path=facts.path,
        size_bytes=facts.size_bytes,
        mode=facts.mode,
        update_time=messages.timestamp(facts.mtime_ns // 1_000_000),
    )
