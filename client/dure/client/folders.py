"""Calls about folders and the files in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.client.transfer import Progress, download, upload
from dure.client.tree import LocalFile, files_of, inside
from dure.v1 import folder_pb2, folder_pb2_grpc
from dure.v1.folder_pb2 import CheckFolderResponse, File, Folder, FolderUsage
from dure.wire import names
from dure.wire.errors import InvalidInput, NotFound

Result = TypeVar("Result")

# Hides the latency of small files; more would not make large ones faster.
TRANSFERS_MAX = 4


class FolderGroup:
    """`client.folders`."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = folder_pb2_grpc.FolderServiceStub(caller.channel)

    async def create(self, name: str, usage: FolderUsage.ValueType) -> Folder:
        request = folder_pb2.CreateFolderRequest(
            parent=names.project(self._project), folder_id=name, folder=Folder(usage=usage)
        )
        response = await self._caller.unary(self._stub.CreateFolder, request, idempotent=False)
        return response.folder

    async def get(self, name: str) -> Folder:
        request = folder_pb2.GetFolderRequest(name=self.full_name(name))
        return (await self._caller.unary(self._stub.GetFolder, request)).folder

    async def delete(self, name: str) -> None:
        """With all its files; refused while a living endpoint mounts it."""
        request = folder_pb2.DeleteFolderRequest(name=self.full_name(name))
        await self._caller.unary(self._stub.DeleteFolder, request, idempotent=False)

    async def check(self, name: str, *, model_definition_path: str = "") -> CheckFolderResponse:
        """Everything that is wrong with the definition files of a model folder, and which files were read."""
        request = folder_pb2.CheckFolderRequest(
            name=self.full_name(name), model_definition_path=model_definition_path
        )
        return await self._caller.unary(self._stub.CheckFolder, request)

    def ls(self, name: str) -> AsyncIterator[File]:
        """All files of a folder, by path."""

        async def fetch(token: str) -> tuple[list[File], str]:
            request = folder_pb2.ListFilesRequest(
                parent=self.full_name(name), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListFiles, request)
            return [*page.files], page.next_page_token

        return all_pages(fetch)

    async def rm(self, name: str, path: str, *, recursive: bool = False) -> None:
        """Removes a file, or with `recursive` a sub-folder and all in it."""
        request = folder_pb2.DeleteFileRequest(
            folder=self.full_name(name), path=inside(path), recursive=recursive
        )
        await self._caller.unary(self._stub.DeleteFile, request, idempotent=False)

    async def upload(
        self,
        name: str,
        source: Path | Sequence[LocalFile],
        *,
        to: str = "",
        follow_symlinks: bool = False,
        progress: Progress | None = None,
    ) -> list[File]:
        """Uploads a directory's content or a file (see tree.files_of), a few files at once.

        Each file appears whole or not at all; after an error those already sent stay.
        """
        if isinstance(source, Path):
            files: Sequence[LocalFile] = await asyncio.to_thread(
                files_of, source, to, follow_symlinks=follow_symlinks
            )
        else:
            files = source
        folder = self.full_name(name)
        # An unknown folder is told before the first file is read.
        await self.get(folder)
        return await _several(upload(self._caller, self._stub, folder, file, progress) for file in files)

    async def select(self, name: str, path: str = "") -> list[File]:
        """The file at `path`, or those below it; all files for "". Raises NotFound if there are none."""
        wanted = path.strip("/")
        if wanted:
            inside(wanted)
        files = [
            file
            async for file in self.ls(name)
            if not wanted or file.path == wanted or file.path.startswith(f"{wanted}/")
        ]
        if wanted and not files:
            raise NotFound(f"folder {name.rsplit('/', 1)[-1]} has nothing at `{wanted}`")
        return files

    async def download(
        self, name: str, target: Path, *, path: str = "", progress: Progress | None = None
    ) -> list[Path]:
        """Downloads a folder, a sub-folder's content or one file; returns what was written.

        A folder goes into the directory `target`; a file becomes `target`, or goes into it if that is a
        directory.
        """
        wanted = path.strip("/")
        files = await self.select(name, wanted)
        if wanted and len(files) == 1 and files[0].path == wanted:
            places = [target / Path(wanted).name if target.is_dir() else target]
        else:
            # The manager is not trusted with where we write: a path that climbs out is refused.
            places = [
                target / inside(file.path).removeprefix(f"{wanted}/" if wanted else "") for file in files
            ]
            _stay_below(target, places)
        folder = self.full_name(name)
        await _several(
            download(self._caller, self._stub, folder, file, place, progress)
            for file, place in zip(files, places, strict=True)
        )
        return places

    # Below it, `list` in an annotation would mean this.
    def list(self) -> AsyncIterator[Folder]:
        """By name."""

        async def fetch(token: str) -> tuple[list[Folder], str]:
            request = folder_pb2.ListFoldersRequest(
                parent=names.project(self._project), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListFolders, request)
            return [*page.folders], page.next_page_token

        return all_pages(fetch)

    def full_name(self, name: str) -> str:
        return name if "/" in name else names.folder(self._project, name)


def _stay_below(target: Path, places: Iterable[Path]) -> None:
    root = target.resolve()
    for place in places:
        if not place.parent.resolve().is_relative_to(root):
            raise InvalidInput(f"{place} is behind a link that leads out of {target}; nothing was downloaded")


async def _several(jobs: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs the jobs, a few at a time; the first error cancels the others and is raised as it is."""
    gate = asyncio.Semaphore(TRANSFERS_MAX)

    async def one(job: Coroutine[Any, Any, Result]) -> Result:
        async with gate:
            return await job

    waiting = [*jobs]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in waiting]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for job in waiting:
            job.close()
    return [task.result() for task in tasks]
