"""The fake manager's FolderService and TokenService."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from grpc_status import rpc_status
from link.client.fake_state import FakeManager, Unavailable, page, refuses

from dure.v1 import folder_pb2, folder_pb2_grpc, token_pb2, token_pb2_grpc
from dure.wire.channel import PIECE_BYTES
from dure.wire.errors import (
    AlreadyExists,
    DureError,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Violation,
    to_status,
)


class Folders(folder_pb2_grpc.FolderServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def find(self, name: str) -> folder_pb2.Folder:
        if name not in self.fake.folders:
            raise NotFound(f"there is no folder `{name.rsplit('/', 1)[-1]}`")
        folder = self.fake.folders[name]
        folder.file_count = len(self.fake.files[name])
        folder.size_bytes = sum(len(content) for _, content in self.fake.files[name].values())
        return folder

    @refuses
    async def CreateFolder(self, request: Any, context: Any) -> folder_pb2.CreateFolderResponse:
        self.fake.called("CreateFolder")
        name = f"{request.parent}/folders/{request.folder_id}"
        if name in self.fake.folders:
            raise AlreadyExists(f"a folder `{request.folder_id}` exists already")
        folder = folder_pb2.Folder(name=name, uid=self.fake.uid(), usage=request.folder.usage)
        folder.create_time.GetCurrentTime()
        self.fake.folders[name], self.fake.files[name] = folder, {}
        return folder_pb2.CreateFolderResponse(folder=folder)

    @refuses
    async def GetFolder(self, request: Any, context: Any) -> folder_pb2.GetFolderResponse:
        return folder_pb2.GetFolderResponse(folder=self.find(request.name))

    @refuses
    async def ListFolders(self, request: Any, context: Any) -> folder_pb2.ListFoldersResponse:
        items, token = page([self.find(name) for name in sorted(self.fake.folders)], request, self.fake)
        return folder_pb2.ListFoldersResponse(folders=items, next_page_token=token)

    @refuses
    async def DeleteFolder(self, request: Any, context: Any) -> folder_pb2.DeleteFolderResponse:
        self.find(request.name)
        users = [e.name.rsplit("/", 1)[-1] for e in self.fake.endpoints.values() if e.model == request.name]
        if users:
            raise FailedPrecondition(f"the folder is used by endpoint {users[0]}: delete that first")
        del self.fake.folders[request.name], self.fake.files[request.name]
        return folder_pb2.DeleteFolderResponse()

    @refuses
    async def ListFiles(self, request: Any, context: Any) -> folder_pb2.ListFilesResponse:
        self.find(request.parent)
        stored = self.fake.files[request.parent]
        items, token = page([stored[path][0] for path in sorted(stored)], request, self.fake)
        return folder_pb2.ListFilesResponse(files=items, next_page_token=token)

    async def UploadFile(self, request_iterator: Any, context: Any) -> folder_pb2.UploadFileResponse:
        try:
            self.fake.authenticate(context)
            first = await anext(aiter(request_iterator))
            header = first.header
            self.find(header.folder)
            content = bytearray()
            async for piece in request_iterator:
                content += piece.data
                self.fake.called("UploadPiece")
            if len(content) != header.size_bytes:
                raise InvalidInput(
                    f"{header.path}: {len(content)} bytes came, {header.size_bytes} were announced"
                )
            if header.sha256 and hashlib.sha256(content).hexdigest() != header.sha256:
                raise InvalidInput(f"{header.path}: the SHA-256 differs")
            file = folder_pb2.File(path=header.path, size_bytes=len(content), mode=header.mode or 0o644)
            file.update_time.GetCurrentTime()
            self.fake.files[header.folder][header.path] = file, bytes(content)
            return folder_pb2.UploadFileResponse(file=file)
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
            raise

    async def DownloadFile(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            self.fake.authenticate(context)
            self.find(request.folder)
            file, content = self.fake.files[request.folder][request.path]
            yield folder_pb2.DownloadFileResponse(file=file)
            for start in range(request.offset, len(content), PIECE_BYTES):
                yield folder_pb2.DownloadFileResponse(data=content[start : start + PIECE_BYTES])
                if self.fake.break_download_after is not None and start >= self.fake.break_download_after:
                    self.fake.break_download_after = None
                    raise Unavailable("going away")
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))

    @refuses
    async def DeleteFile(self, request: Any, context: Any) -> folder_pb2.DeleteFileResponse:
        stored = self.fake.files[self.find(request.folder).name]
        below = [path for path in stored if path.startswith(f"{request.path}/")]
        if below and not request.recursive:
            raise FailedPrecondition(f"`{request.path}` is a sub-folder with files in it: remove it with -r")
        if request.path not in stored and not below:
            raise NotFound(f"there is no file `{request.path}`")
        for path in [*below, request.path]:
            stored.pop(path, None)
        return folder_pb2.DeleteFileResponse()


class Tokens(token_pb2_grpc.TokenServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def _find(self, name: str) -> token_pb2.Token:
        if name not in self.fake.tokens:
            raise NotFound(f"there is no token `{name.rsplit('/', 1)[-1]}`")
        return self.fake.tokens[name]

    @refuses
    async def CreateToken(self, request: Any, context: Any) -> token_pb2.CreateTokenResponse:
        self.fake.called("CreateToken")
        if request.parent not in self.fake.endpoints:
            raise NotFound(f"there is no endpoint `{request.parent.rsplit('/', 1)[-1]}`")
        if request.WhichOneof("expiry") == "ttl" and request.ttl.ToSeconds() <= 0:
            raise InvalidInput.of([Violation("ttl", "must be more than zero")])
        uid = self.fake.uid()
        token = token_pb2.Token(
            name=f"{request.parent}/tokens/{uid}",
            uid=uid,
            label=request.label,
            status=token_pb2.TOKEN_STATUS_ACTIVE,
            secret=f"secret-of-{uid}",
        )
        token.create_time.GetCurrentTime()
        if request.WhichOneof("expiry") == "ttl":
            token.expire_time.FromSeconds(token.create_time.seconds + request.ttl.seconds)
        else:
            token.expire_time.CopyFrom(request.expire_time)
        self.fake.tokens[token.name] = token
        return token_pb2.CreateTokenResponse(token=token)

    @refuses
    async def GetToken(self, request: Any, context: Any) -> token_pb2.GetTokenResponse:
        return token_pb2.GetTokenResponse(token=self._find(request.name))

    @refuses
    async def ListTokens(self, request: Any, context: Any) -> token_pb2.ListTokensResponse:
        found = []
        for token in reversed(self.fake.tokens.values()):
            shown = token_pb2.Token()
            shown.CopyFrom(token)
            shown.secret = ""
            found.append(shown)
        items, next_token = page(found, request, self.fake)
        return token_pb2.ListTokensResponse(tokens=items, next_page_token=next_token)

    @refuses
    async def RevokeToken(self, request: Any, context: Any) -> token_pb2.RevokeTokenResponse:
        token = self._find(request.name)
        token.status = token_pb2.TOKEN_STATUS_REVOKED
        return token_pb2.RevokeTokenResponse(token=token)
