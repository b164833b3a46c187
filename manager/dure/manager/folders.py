"""Folder storage on disk: `<root>/<folder uid>/<path>`, nothing outside of it, ever.

Paths are walked component by component with O_NOFOLLOW from the folder's own descriptor, so neither `..`
nor a symbolic link that somebody put there leads out. Files are written beside the folders and renamed
into place: a reader sees a whole file or none. All disk work happens in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dure.fleet.v1 import fleet_pb2
from dure.wire import errors
from dure.wire.errors import Violation
from dure.wire.settings import write_file

PATH_BYTES_MAX, DEPTH_MAX = 1024, 32
FILES_MAX = 100_000
FILE_BYTES_MAX = 1 << 40
# Uploads stop before the disk of the manager's own database is full.
DISK_FREE_BYTES_MIN = 256 << 20
HASHES_MAX = 100_000
_STAGING = ".staging"


@dataclass(frozen=True)
class FileFacts:
    """A file of a folder. `mtime_ns` with size tells whether a remembered hash still holds."""

    path: str
    size_bytes: int
    mode: int
    mtime_ns: int


class Folders:
    """The storage below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o755)
        shutil.rmtree(root / _STAGING, ignore_errors=True)
        (root / _STAGING).mkdir(mode=0o700)
        marker = root / ".storage-id"
        if not marker.exists():
            write_file(marker, secrets.token_hex(16).encode(), 0o644)
        self.storage_id = marker.read_text(encoding="ascii").strip()
        self._hashes: OrderedDict[tuple[str, FileFacts], str] = OrderedDict()

    async def create(self, uid: str) -> None:
        await asyncio.to_thread((self.root / uid).mkdir, mode=0o755)

    async def remove(self, uid: str) -> None:
        """Out of sight at once, then off the disk."""
        grave = self.root / _STAGING / f"removed-{uid}"
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(os.rename, self.root / uid, grave)
        await asyncio.to_thread(shutil.rmtree, grave, True)

    async def files(self, uid: str) -> list[FileFacts]:
        """All files, by path. Raises ResourceExhausted beyond FILES_MAX."""
        return await asyncio.to_thread(self._list, uid)

    async def manifest(self, uid: str) -> list[fleet_pb2.ManifestFile]:
        """All files with their hashes; those of unchanged files are remembered."""
        return await asyncio.to_thread(self._manifest, uid)

    async def read_small(self, uid: str, path: str, bytes_max: int) -> bytes | None:
        """The first `bytes_max` bytes of a file, None if there is none. Raises InvalidInput (bad path)."""
        return await asyncio.to_thread(self._read_small, uid, path, bytes_max)

    async def has_directory(self, uid: str, path: str) -> bool:
        """Whether there is such a sub-folder. Raises InvalidInput for a bad path, or one through a link."""
        return await asyncio.to_thread(self._has_directory, uid, path)

    async def facts(self, uid: str, path: str) -> FileFacts:
        """Raises NotFound."""
        return await asyncio.to_thread(self._facts, uid, path)

    async def read(self, uid: str, path: str, offset: int, piece_bytes: int) -> AsyncIterator[bytes]:
        """Content from an offset on, in pieces. Raises NotFound."""
        if offset < 0:
            raise errors.InvalidInput.of([Violation("offset", "must not be negative")])
        file = await asyncio.to_thread(self._open, uid, path)
        try:
            await asyncio.to_thread(file.seek, offset)
            while data := await asyncio.to_thread(file.read, piece_bytes):
                yield data
        finally:
            file.close()

    async def write(
        self, uid: str, path: str, size_bytes: int, sha256: str, mode: int, pieces: AsyncIterator[bytes]
    ) -> FileFacts:
        """Writes a whole file. Raises InvalidInput if size or hash differ from what was announced."""
        check_path(path)
        if not 0 <= size_bytes <= FILE_BYTES_MAX:
            raise errors.InvalidInput.of([Violation("size_bytes", f"must be from 0 to {FILE_BYTES_MAX}")])
        free = shutil.disk_usage(self.root).free
        if size_bytes > free - DISK_FREE_BYTES_MIN:
            raise errors.ResourceExhausted(
                f"no room for {path}: {size_bytes} bytes wanted, {max(0, free - DISK_FREE_BYTES_MIN)} free",
                reason="DISK_FULL",
            )
        staged = self.root / _STAGING / secrets.token_hex(16)
        digest, received = hashlib.sha256(), 0
        try:
            with open(staged, "wb", buffering=0) as file:
                async for data in pieces:
                    received += len(data)
                    if received > size_bytes:
                        break
                    digest.update(data)
                    await asyncio.to_thread(file.write, data)
                if received != size_bytes:
                    found = f"{size_bytes} bytes were announced, {received} or more came"
                    raise errors.InvalidInput.of([Violation("size_bytes", found)])
                if sha256 and digest.hexdigest() != sha256.lower():
                    raise errors.InvalidInput.of(
                        [Violation("sha256", "differs from the content that came; upload the file again")]
                    )
                os.fchmod(file.fileno(), (mode or 0o644) & 0o777)
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(self._publish, uid, path, staged)
        except OSError as error:
            raise _disk_error(error, path) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                staged.unlink()
        facts = await self.facts(uid, path)
        self._remember(uid, facts, digest.hexdigest())
        return facts

    async def delete(self, uid: str, path: str, *, recursive: bool) -> None:
        """Raises NotFound, or FailedPrecondition for a sub-folder that is not empty."""
        await asyncio.to_thread(self._delete, uid, path, recursive)

    # What follows runs in threads.

    @contextlib.contextmanager
    def _parent(self, uid: str, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Descriptor of the directory that holds `path`, and the last part of it."""
        parts = check_path(path)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.root / uid, flags)
        except FileNotFoundError as error:
            raise errors.NotFound("the folder's storage is gone") from error
        try:
            for part in parts[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=descriptor)
                below = os.open(part, flags, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor, parts[-1]
        except OSError as error:
            raise _disk_error(error, path) from error
        finally:
            os.close(descriptor)

    def _publish(self, uid: str, path: str, staged: Path) -> None:
        with self._parent(uid, path, make=True) as (directory, name):
            os.rename(staged, name, dst_dir_fd=directory)

    def _open(self, uid: str, path: str) -> BinaryIO:
        with self._parent(uid, path) as (directory, name):
            descriptor = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
            )
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise errors.NotFound(f"`{path}` is not a file")
            return open(descriptor, "rb")

    def _facts(self, uid: str, path: str) -> FileFacts:
        with self._open(uid, path) as file:
            found = os.fstat(file.fileno())
        return FileFacts(path, found.st_size, stat.S_IMODE(found.st_mode), found.st_mtime_ns)

    def _read_small(self, uid: str, path: str, bytes_max: int) -> bytes | None:
        try:
            with self._open(uid, path) as file:
                return file.read(bytes_max)
        except errors.NotFound:
            return None

    def _has_directory(self, uid: str, path: str) -> bool:
        try:
            with self._parent(uid, path) as (directory, name):
                return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        except errors.NotFound:
            return False

    def _list(self, uid: str) -> list[FileFacts]:
        found: list[FileFacts] = []
        for directory, names, files, descriptor in os.fwalk(self.root / uid, follow_symlinks=False):
            names.sort()
            base = Path(directory).relative_to(self.root / uid)
            for name in files:
                facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if not stat.S_ISREG(facts.st_mode):
                    continue
                if len(found) >= FILES_MAX:
                    raise errors.ResourceExhausted(f"the folder has more than {FILES_MAX} files")
                path = str(base / name)
                found.append(FileFacts(path, facts.st_size, stat.S_IMODE(facts.st_mode), facts.st_mtime_ns))
        return sorted(found, key=lambda facts: facts.path)

    def _manifest(self, uid: str) -> list[fleet_pb2.ManifestFile]:
        return [
            fleet_pb2.ManifestFile(
                path=facts.path, size_bytes=facts.size_bytes, mode=facts.mode, sha256=self._hash(uid, facts)
            )
            for facts in self._list(uid)
        ]

    def _hash(self, uid: str, facts: FileFacts) -> str:
        known = self._hashes.get((uid, facts))
        if known is None:
            with self._open(uid, facts.path) as file:
                known = _sha256(file)
            self._remember(uid, facts, known)
        return known

    def _remember(self, uid: str, facts: FileFacts, digest: str) -> None:
        self._hashes[uid, facts] = digest
        while len(self._hashes) > HASHES_MAX:
            self._hashes.popitem(last=False)

    def _delete(self, uid: str, path: str, recursive: bool) -> None:
        with self._parent(uid, path) as (directory, name):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=directory)
            elif recursive:
                shutil.rmtree(name, dir_fd=directory)
            else:
                os.rmdir(name, dir_fd=directory)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def check_path(path: str) -> list[str]:
    """The parts of a path in a folder. Raises InvalidInput for one that is absolute, leads out, or is odd."""
    parts = path.split("/")
    wrong = ""
    if not path:
        wrong = "is required"
    elif path.startswith("/"):
        wrong = "must not begin with `/`: it is relative to the folder"
    elif any(part in ("", ".", "..") for part in parts):
        wrong = "must not contain empty parts, `.` or `..`"
    elif any(ord(character) < 32 or ord(character) == 127 for character in path):
        wrong = "must not contain control characters"
    elif len(path.encode("utf-8", "surrogatepass")) > PATH_BYTES_MAX or len(parts) > DEPTH_MAX:
        wrong = f"is longer than {PATH_BYTES_MAX} bytes, or deeper than {DEPTH_MAX} folders"
    elif any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        wrong = "has a part that is longer than 255 bytes"
    if wrong:
        raise errors.InvalidInput.of([Violation("path", f"`{path[:120]}` {wrong}")])
    return parts


def _disk_error(error: OSError, path: str) -> errors.DureError:
    """What the operating system said, as an answer."""
    if error.errno == errno.ENOENT:
        return errors.NotFound(f"no file `{path}` in the folder")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return errors.InvalidInput.of(
            [
                Violation(
                    "path", f"`{path}` passes through something that is not a folder (links are not followed)"
                )
            ]
        )
    if error.errno == errno.ENOTEMPTY:
        return errors.FailedPrecondition(f"`{path}` is not empty; set recursive to remove all in it")
    if error.errno in (errno.EISDIR, errno.EEXIST):
        return errors.FailedPrecondition(f"`{path}` is a folder; remove it first")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.ResourceExhausted("the disk of the folder storage is full", reason="DISK_FULL")
    return errors.FailedPrecondition(f"cannot use `{path}`: {os.strerror(error.errno or 0)}")
