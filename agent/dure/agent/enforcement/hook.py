"""The hook: HAMi-core's library, if the node's operator has it, is loaded into every program of a kernel, and
refuses it GPU memory beyond its share.

The loader ignores a library that it cannot load, without a word to anybody: so nothing is believed but the
memory maps of the processes that use a GPU. The agent keeps a copy of its own, so that replacing the
operator's file takes nothing away from kernels that run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from dure.agent.backends.base import Bind, Ended, Injection
from dure.agent.enforcement import CannotHold, Held, Seen, mebibytes, percent
from dure.agent.enforcement.choice import NOT_USED_YET
from dure.agent.waiting import in_thread
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import HOOK

# Where HAMi's own images and documents have it.
TARGET_FOLDER = "/usr/local/vgpu"
TARGET = f"{TARGET_FOLDER}/libvgpu.so"
# The library's own lock between programs of a node; the path is built into it.
LOCK_FOLDER = Path("/tmp/vgpulock")
LIBRARY_BYTES_MAX = 64 * 2**20
# Copies of libraries that the operator gave, oldest dropped first: kernels of old ones may still run.
COPIES_MAX = 8
LOAD_LIMIT_S = 10.0
_MAP = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s+(/.*)")


@dataclass(frozen=True)
class Mapped:
    """A file in a process's memory, and its path as the process saw it."""

    device: int
    inode: int
    path: str


def mapped(maps: str, inodes: Collection[int]) -> Iterator[Mapped]:
    """Files of these inodes in the text of /proc/PID/maps, which may have thousands of lines."""
    marks = [f" {inode} " for inode in inodes]
    for line in maps.splitlines():
        found = _MAP.fullmatch(line) if any(mark in line for mark in marks) else None
        if found is not None:
            major, minor, inode, path = found.groups()
            yield Mapped(os.makedev(int(major, 16), int(minor, 16)), int(inode), path)


def is_library(file: Mapped, device: int, inode: int, places: frozenset[str]) -> bool:
    """Whether it is the library of this identity. Some file systems show another device number in maps than
    to those who ask for it: then the place must be right."""
    return file.inode == inode and (file.device == device or file.path in places)


class Hook:
    """See `enforcement.Enforcer`. `library` is the operator's, None if there is none: then kernels of an
    earlier agent are still verified. Copies are kept in `home`."""

    name = HOOK
    by_use = True

    def __init__(self, home: Path, library: Path | None, lock_folder: Path = LOCK_FOLDER) -> None:
        self._copies = home / "hook"
        self._library = library
        self._lock_folder = lock_folder
        self._copy: Path | None = None
        # Why it cannot be used; None before it was tried.
        self._problem: str | None = None if library else "no library was given (--hook-library)"

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        if device.accelerator != "cuda":
            return "it is for NVIDIA GPUs"
        if not told:
            return "the driver does not tell which processes use it, so that nothing could be verified"
        if self._problem is None:
            self._problem = await in_thread(self._take)
        return self._problem

    async def inject(self, kernel: Held) -> Injection:
        if self._copy is None:
            raise CannotHold(self._problem or "the library was not looked at yet")
        environ = {
            f"CUDA_DEVICE_MEMORY_LIMIT_{index}": f"{mebibytes(part)}m"
            for index, part in enumerate(kernel.parts)
        }
        own = kernel.folder / "vgpu"
        try:
            await asyncio.to_thread(self._make_folders, own)
        except OSError as error:
            raise CannotHold(f"its folders cannot be made: {error}") from error
        environ |= {
            "CUDA_DEVICE_SM_LIMIT": str(min(percent(part) for part in kernel.parts)),
            "GPU_CORE_UTILIZATION_POLICY": "force",
            # Either would undo it, if the user could set it.
            "CUDA_DISABLE_CONTROL": "false",
            "CUDA_OVERSUBSCRIBE": "false",
        }
        if not kernel.contained:
            preload = [str(self._copy), kernel.environ.get("LD_PRELOAD", "")]
            environ["LD_PRELOAD"] = ":".join(one for one in preload if one)
            environ["CUDA_DEVICE_MEMORY_SHARED_CACHE"] = str(own / "cache")
            return Injection(environ)
        preloads = own / "ld.so.preload"
        environ["CUDA_DEVICE_MEMORY_SHARED_CACHE"] = f"{TARGET_FOLDER}/shared/cache"
        return Injection(
            environ,
            (
                Bind(str(self._copy), TARGET, True),
                Bind(os.path.realpath(preloads), "/etc/ld.so.preload", True),
                Bind(os.path.realpath(own / "shared"), f"{TARGET_FOLDER}/shared", False),
                Bind(str(self._lock_folder), str(LOCK_FOLDER), False),
            ),
        )

    def verify(self, kernel: Held, seen: Seen) -> str:
        copies = self._all_copies()
        known = [copy.stat() for copy in copies]
        inodes, places = [is_.st_ino for is_ in known], frozenset({TARGET, *map(str, copies)})
        looked_at = False
        for pid in sorted(seen.using):
            try:
                maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                # It has ended since it was seen.
                continue
            except OSError as error:
                return f"what process {pid} has loaded cannot be read: {error.strerror}"
            if not maps:
                # It is ending.
                continue
            looked_at = True
            files = mapped(maps, inodes)
            if not any(is_library(file, is_.st_dev, is_.st_ino, places) for file in files for is_ in known):
                return f"process {pid} uses the GPU, and has not loaded the library"
        return "" if looked_at else NOT_USED_YET

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        return None

    def forget(self, living: frozenset[str]) -> None:
        return None

    def _all_copies(self) -> list[Path]:
        return sorted(self._copies.glob("libvgpu-*.so")) if self._copies.is_dir() else []

    def _take(self) -> str:
        """Copies the library and tries to load it. Empty if that worked, else a sentence."""
        assert self._library is not None
        try:
            if self._library.stat().st_size > LIBRARY_BYTES_MAX:
                return f"{self._library} is no such library: it is larger than {LIBRARY_BYTES_MAX >> 20} MiB"
            content = self._library.read_bytes()
            self._copies.mkdir(parents=True, exist_ok=True)
            copy = Path(
                os.path.realpath(self._copies / f"libvgpu-{hashlib.sha256(content).hexdigest()[:16]}.so")
            )
            if not copy.exists():
                new = copy.with_suffix(".new")
                new.write_bytes(content)
                # Programs of any user load it.
                new.chmod(0o755)
                new.replace(copy)
            os.utime(copy)
            self._drop_old()
        except OSError as error:
            return f"the library {self._library} cannot be read or copied: {error.strerror or error}"
        problem = _loads(copy)
        if problem:
            return f"the library {self._library} cannot be loaded: {problem}"
        self._copy = copy
        return ""

    def _drop_old(self) -> None:
        for copy in sorted(self._all_copies(), key=lambda one: one.stat().st_mtime)[:-COPIES_MAX]:
            copy.unlink()

    def _make_folders(self, own: Path) -> None:
        shared = own / "shared"
        shared.mkdir(parents=True, exist_ok=True)
        # A container's user may be anybody; nobody else comes through the kernel's folder.
        shared.chmod(0o1777)
        preloads = own / "ld.so.preload"
        preloads.write_text(TARGET + "\n", encoding="ascii")
        preloads.chmod(0o644)
        try:
            self._lock_folder.mkdir()
            self._lock_folder.chmod(0o1777)
        except FileExistsError:
            # It lies where anybody may make it.
            if not stat.S_ISDIR(self._lock_folder.lstat().st_mode):
                raise NotADirectoryError(20, "is no folder", str(self._lock_folder)) from None


def _loads(library: Path) -> str:
    """Empty if a program of this node, told to, loads it."""
    program = shutil.which("cat")
    if program is None:
        return "there is no program `cat` to try it with"
    environ = {"PATH": os.environ.get("PATH", os.defpath), "LD_PRELOAD": str(library)}
    if "LD_LIBRARY_PATH" in os.environ:
        environ["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    try:
        done = subprocess.run(
            [program, "/proc/self/maps"],
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOAD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a program with it did not end within {LOAD_LIMIT_S:g} s"
    is_ = library.stat()
    files = mapped(done.stdout, [is_.st_ino])
    if any(is_library(file, is_.st_dev, is_.st_ino, frozenset({str(library)})) for file in files):
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[0][:300] if lines else f"a program with it exited with code {done.returncode}"
