"""Content of files, to the manager and from it, in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from dure.client.call import Caller
from dure.client.tree import LocalFile
from dure.v1 import folder_pb2, folder_pb2_grpc
from dure.v1.folder_pb2 import DownloadFileRequest, File, UploadFileRequest, UploadHeader
from dure.wire.channel import PIECE_BYTES
from dure.wire.errors import DureError, InvalidInput

# A transfer may be slow, but not stand still: it has a minute, and time for its size at this rate.
_SLOWEST_BYTES_PER_S = 128 * 1024
# The file's path, and bytes more that were moved (fewer, below zero, when a piece has to be moved again).
Progress = Callable[[str, int], None]


def time_limit_s(size_bytes: int) -> float:
    return 60 + size_bytes / _SLOWEST_BYTES_PER_S


async def upload(
    caller: Caller,
    stub: folder_pb2_grpc.FolderServiceAsyncStub,
    folder: str,
    file: LocalFile,
    progress: Progress | None,
) -> File:
    """Sends one file; `folder` is a full name. It appears whole or not at all, so it is safe to repeat."""
    digest = await asyncio.to_thread(_sha256, file.source)
    moved = 0

    async def pieces() -> AsyncIterator[UploadFileRequest]:
        nonlocal moved
        yield UploadFileRequest(
            header=UploadHeader(
                folder=folder, path=file.path, size_bytes=file.size_bytes, sha256=digest, mode=file.mode
            )
        )
        left = file.size_bytes
        with open(file.source, "rb") as source:
            while left:
                data = await asyncio.to_thread(source.read, min(PIECE_BYTES, left))
                if not data:
                    # The manager refuses the short content, and says so better than an error in here would.
                    return
                left -= len(data)
                yield UploadFileRequest(data=data)
                moved += len(data)
                if progress:
                    progress(file.path, len(data))

    async def once() -> folder_pb2.UploadFileResponse:
        nonlocal moved
        if moved and progress:
            progress(file.path, -moved)
        moved = 0
        return await stub.UploadFile(
            pieces(), metadata=caller.metadata, timeout=time_limit_s(file.size_bytes)
        )

    return (await caller.repeat(once)).file


async def download(
    caller: Caller,
    stub: folder_pb2_grpc.FolderServiceAsyncStub,
    folder: str,
    file: File,
    target: Path,
    progress: Progress | None,
) -> None:
    """Writes one file to `target`, whole or not at all; a broken connection is taken up where it broke."""
    await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(descriptor, "wb") as sink:
            received = 0
            facts: File | None = None

            async def once() -> None:
                nonlocal received, facts
                request = DownloadFileRequest(folder=folder, path=file.path, offset=received)
                call = stub.DownloadFile(
                    request, metadata=caller.metadata, timeout=time_limit_s(file.size_bytes)
                )
                try:
                    async for piece in call:
                        if piece.HasField("file"):
                            if facts is not None and _changed(facts, piece.file):
                                raise DureError(f"{file.path} was changed while it was downloaded; try again")
                            facts = piece.file
                            continue
                        await asyncio.to_thread(sink.write, piece.data)
                        received += len(piece.data)
                        if progress:
                            progress(file.path, len(piece.data))
                finally:
                    call.cancel()

            await caller.repeat(once)
            if facts is None or received != facts.size_bytes:
                raise DureError(
                    f"{file.path}: {received} bytes came, another number was announced; try again"
                )
            os.fchmod(sink.fileno(), (facts.mode & 0o777) or 0o644)
        await asyncio.to_thread(_put, temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _changed(before: File, now: File) -> bool:
    return before.size_bytes != now.size_bytes or before.update_time != now.update_time


def _put(temporary: str, target: Path) -> None:
    if target.is_dir():
        raise InvalidInput(f"{target} is a directory")
    os.replace(temporary, target)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
