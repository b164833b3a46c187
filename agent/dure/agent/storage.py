"""What the manager keeps for kernels, over the stream's channel: its folders, in the terms of
`folders.Storage`, and with what their images are fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from dure.agent.folders import FILES_MAX
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire.channel import bearer
from dure.wire.errors import ResourceExhausted, TimedOut, from_rpc

_Message = TypeVar("_Message")
# Between two messages of a call.
SILENCE_LIMIT_S = 30.0
CREDENTIAL_LIMIT_S = 10.0


class ManagerStorage:
    """Answers once the link has announced a Welcome."""

    def __init__(self, stub: fleet_pb2_grpc.FleetServiceAsyncStub) -> None:
        self._stub = stub
        self._credential = ""
        self._welcome: fleet_pb2.Welcome | None = None
        self._welcomed = asyncio.Event()

    def announce(self, credential: str, welcome: fleet_pb2.Welcome) -> None:
        self._credential = credential
        self._welcome = welcome
        self._welcomed.set()

    async def welcome(self) -> fleet_pb2.Welcome:
        """Waits for the first stream; who waits is cancelled when its kernel is."""
        await self._welcomed.wait()
        assert self._welcome is not None
        return self._welcome

    async def manifest(self, folder_uid: str) -> list[fleet_pb2.ManifestFile]:
        call = self._stub.GetFolderManifest(
            fleet_pb2.GetFolderManifestRequest(folder_uid=folder_uid), metadata=bearer(self._credential)
        )
        files: list[fleet_pb2.ManifestFile] = []
        async for piece in _messages(call):
            files += piece.files
            if len(files) > FILES_MAX:
                raise ResourceExhausted(f"the folder has more than {FILES_MAX} files")
        return files

    async def fetch(self, folder_uid: str, path: str, offset: int) -> AsyncIterator[bytes]:
        request = fleet_pb2.FetchFileRequest(folder_uid=folder_uid, path=path, offset=offset)
        async for piece in _messages(self._stub.FetchFile(request, metadata=bearer(self._credential))):
            yield piece.data

    async def image_credential(self, kernel_uid: str, limit_s: float = CREDENTIAL_LIMIT_S) -> tuple[str, str]:
        """User and password for the registry of a kernel's image, both empty if the manager knows none. They
        are for this moment, and not kept. Raises errors of ours: the manager may be away for longer than we
        wait."""
        request = fleet_pb2.GetImageCredentialRequest(kernel_uid=kernel_uid)
        try:
            async with asyncio.timeout(limit_s):
                await self.welcome()
                answer = await self._stub.GetImageCredential(
                    request, metadata=bearer(self._credential), wait_for_ready=True
                )
        except TimeoutError as error:
            raise TimedOut(
                f"the manager did not say within {limit_s:g} s with what to fetch the image"
            ) from error
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                # A manager from before there were credentials.
                return "", ""
            raise from_rpc(error) from error
        return answer.username, answer.password


async def _messages(call: grpc.aio.UnaryStreamCall[Any, _Message]) -> AsyncIterator[_Message]:
    """The messages of a call; raises errors of ours."""
    try:
        while True:
            try:
                async with asyncio.timeout(SILENCE_LIMIT_S):
                    message = await call.read()
            except TimeoutError as error:
                raise TimedOut(f"the manager sent nothing for {SILENCE_LIMIT_S:g} s") from error
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error) from error
            if message is grpc.aio.EOF:
                return
            yield cast(_Message, message)
    finally:
        call.cancel()
