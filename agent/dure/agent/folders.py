"""Where the files of a model folder are on this node.

If the manager's storage is mounted here (its id file says so), it is used as it is. Otherwise the folder
is fetched into a cache keyed by content: `cache/<digest>/` is complete and verified, `cache/<digest>.part/`
is under way and resumed. When the cache is full, folders that no kernel uses go, longest unused first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dure.agent.backends.base import StartFailed
from dure.fleet.v1 import fleet_pb2
from dure.wire.backoff import backoff_s
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut
from dure.wire.quantities import human_bytes

# Tries without a byte of progress before a kernel's start fails: about a minute without the manager.
TRIES_MAX = 60
FILES_MAX = 100_000


class Storage(Protocol):
    """The manager's folders, over the wire. Both raise DureError."""

    async def welcome(self) -> fleet_pb2.Welcome: ...

    async def manifest(self, folder_uid: str) -> list[fleet_pb2.ManifestFile]: ...

    def fetch(self, folder_uid: str, path: str, offset: int) -> AsyncIterator[bytes]: ...


class Folders:
    """Provides folders to kernels, each of which names what it uses of the cache in its file `content`."""

    def __init__(self, home: Path, storage: Storage, cache_bytes_max: int) -> None:
        self._cache = home / "cache"
        self._kernels = home / "kernels"
        self._storage = storage
        self._bytes_max = cache_bytes_max
        # One at a time: kernels of one folder must not fetch it twice, and eviction must see what is needed.
        self._lock = asyncio.Lock()

    async def provide(self, mount: fleet_pb2.Mount, kernel_folder: Path) -> Path:
        """The real folder of a mount. Raises StartFailed."""
        welcome = await self._storage.welcome()
        if not _is_plain(mount.folder_uid):
            raise StartFailed(f"`{mount.folder_uid[:80]}` is no uid of a folder", "FOLDER_FAILED")
        if await asyncio.to_thread(_is_shared, welcome):
            path = Path(welcome.storage_path) / mount.folder_uid
            if not await asyncio.to_thread(path.is_dir):
                raise StartFailed(
                    f"folder `{mount.folder}` is not in the shared storage at {welcome.storage_path}",
                    "FOLDER_FAILED",
                )
            await asyncio.to_thread(_check_subpath, path, mount)
            return path
        if mount.writable:
            raise StartFailed(
                f"folder `{mount.folder}` is wanted writable, and this node does not share the manager's "
                "storage: it could only write to a copy; mount it read-only, or use a resource group whose "
                "nodes mount the storage",
                "FOLDER_FAILED",
            )
        async with self._lock:
            try:
                path = await self._from_cache(mount, kernel_folder)
                await asyncio.to_thread(_check_subpath, path, mount)
                return path
            except DureError as error:
                raise StartFailed(
                    f"cannot fetch folder `{mount.folder}`: {error}", "FOLDER_FAILED"
                ) from error
            except OSError as error:
                message = f"cannot keep folder `{mount.folder}`: {error.strerror or error}"
                raise StartFailed(message, "FOLDER_FAILED") from error

    async def _from_cache(self, mount: fleet_pb2.Mount, kernel_folder: Path) -> Path:
        files = await self._manifest(mount)
        digest = content_digest(files)
        # Before the check, so that nobody evicts it in between.
        with open(kernel_folder / "content", "a", encoding="ascii") as used:
            used.write(f"{digest}\n")
        whole, part = self._cache / digest, self._cache / f"{digest}.part"
        if not whole.is_dir():
            await asyncio.to_thread(self._make_room, sum(file.size_bytes for file in files), digest)
            part.mkdir(parents=True, exist_ok=True)
            for file in files:
                await self._fetch(mount.folder_uid, file, part / file.path)
            await asyncio.to_thread(os.rename, part, whole)
        os.utime(whole)
        return whole

    async def _manifest(self, mount: fleet_pb2.Mount) -> list[fleet_pb2.ManifestFile]:
        tries = 0
        while True:
            try:
                files = await self._storage.manifest(mount.folder_uid)
                break
            except (ManagerUnreachable, TimedOut):
                tries += 1
                await _pause(tries)
        for file in files:
            parts = PurePosixPath(file.path).parts
            if not parts or file.path.startswith("/") or ".." in parts or "\0" in file.path:
                raise StartFailed(
                    f"folder `{mount.folder}` has a file that leads out of it: `{file.path[:200]}`",
                    "FOLDER_FAILED",
                )
        return files

    async def _fetch(self, folder_uid: str, file: fleet_pb2.ManifestFile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tries = wrong = 0
        while True:
            digest, size = await asyncio.to_thread(_digest_of, path)
            if size == file.size_bytes and digest.hexdigest() == file.sha256:
                path.chmod((file.mode & 0o755) | 0o444)
                return
            if size >= file.size_bytes and size > 0:
                # What is there is not the beginning of it.
                path.unlink()
                size = 0
                wrong += 1
            if wrong > 1:
                raise StartFailed(
                    f"`{file.path}` does not have the content that was announced; was it being uploaded?",
                    "FOLDER_FAILED",
                )
            progress = await self._append(folder_uid, file, path, size)
            tries = 0 if progress and size + progress < file.size_bytes else tries + 1
            if not progress or tries > 1:
                await _pause(tries)

    async def _append(self, folder_uid: str, file: fleet_pb2.ManifestFile, path: Path, offset: int) -> int:
        """Bytes that were added before the manager was lost or the file ended."""
        added = 0
        with open(path, "ab") as target, contextlib.suppress(ManagerUnreachable, TimedOut):
            async for data in self._storage.fetch(folder_uid, file.path, offset):
                added += len(data)
                if offset + added > file.size_bytes:
                    raise StartFailed(
                        f"`{file.path}` changed while it was fetched; try again", "FOLDER_FAILED"
                    )
                await asyncio.to_thread(target.write, data)
        return added

    def _make_room(self, bytes_needed: int, digest: str) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        used = {digest}
        for path in self._kernels.glob("*/content"):
            used.update(path.read_text(encoding="ascii").split())
        held = sorted(
            ((path.stat().st_mtime, _size_of(path), path) for path in self._cache.iterdir()),
            key=lambda one: one[0],
        )
        total = (
            sum(size for _, size, path in held if path.name.removesuffix(".part") != digest) + bytes_needed
        )
        for _, size, path in held:
            if total <= self._bytes_max:
                break
            if path.name.removesuffix(".part") not in used:
                shutil.rmtree(path)
                total -= size
        if total > self._bytes_max:
            raise StartFailed(
                f"the folder has {human_bytes(bytes_needed)}, and the cache of this node "
                f"({human_bytes(self._bytes_max)}) is full of folders in use; "
                "give it more with --folder-cache",
                "FOLDER_FAILED",
            )


def content_digest(files: list[fleet_pb2.ManifestFile]) -> str:
    """Names the content of a folder, whatever its uid."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.size_bytes}\0{file.mode:o}\0{file.sha256}\n".encode())
    return digest.hexdigest()


async def _pause(tries: int) -> None:
    if tries > TRIES_MAX:
        raise ManagerUnreachable("the manager did not send it after many tries")
    await asyncio.sleep(backoff_s(tries, first_s=0.1, max_s=1.0, jitter=0.0))


def _is_shared(welcome: fleet_pb2.Welcome) -> bool:
    if not welcome.storage_path or not welcome.storage_id:
        return False
    try:
        found = (Path(welcome.storage_path) / ".storage-id").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return found.strip() == welcome.storage_id


def _check_subpath(folder: Path, mount: fleet_pb2.Mount) -> None:
    """Raises StartFailed. The shim looks again when it mounts: a session may write to the folder."""
    place = folder
    for name in PurePosixPath(mount.subpath).parts:
        place = place / name
        if name in ("..", "/") or place.is_symlink() or not place.is_dir():
            problem = "is a symbolic link" if place.is_symlink() else "is no folder in it"
            raise StartFailed(
                f"folder `{mount.folder}` cannot be mounted from its subpath `{mount.subpath}`: "
                f"`{name}` {problem}",
                "FOLDER_FAILED",
            )


def _is_plain(uid: str) -> bool:
    return bool(uid) and len(uid) <= 64 and all(c.isascii() and (c.isalnum() or c == "-") for c in uid)


def _digest_of(path: Path) -> tuple[Any, int]:
    digest = hashlib.sha256()
    size = 0
    try:
        with open(path, "rb") as file:
            while data := file.read(1024 * 1024):
                digest.update(data)
                size += len(data)
    except FileNotFoundError:
        pass
    return digest, size


def _size_of(path: Path) -> int:
    return sum(below.stat().st_size for below in path.rglob("*") if below.is_file())
