"""The view of the file system that a session has: the host's, but for its own folders.

The process leaves its mount namespace, makes a tmpfs its root and binds the host's top-level folders
into it. Where a mount destination does not exist on the host, a tmpfs with binds of all its neighbours
stands for the deepest folder that does. It maps, it does not isolate: root can still reach the model
folder by its host path.
"""

from __future__ import annotations

import ctypes
import os
import stat

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2
_OLD = "/.dure-host"
# A folder with more neighbours than this is not worth so many mounts.
NEIGHBOURS_MAX = 2000

_libc = ctypes.CDLL(None, use_errno=True)
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [ctypes.c_char_p(text.encode()) for text in (source, target, kind)]
    _check(
        _libc.mount(*arguments, ctypes.c_ulong(flags), ctypes.c_char_p(data.encode())),
        f"mount {source} at {target}",
    )


def unshare_mounts() -> None:
    """Enters a mount namespace of its own, through a user namespace where this is not root."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
    else:
        _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWUSER), "unshare")
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
    # A mount that the host takes away later must not be held here.
    mount("none", "/", "", MS_REC | MS_SLAVE)


class View:
    """Builds the view. The order of calls: enter, what it shows (outer ones first), close."""

    def __init__(self) -> None:
        self._sources = {"/": _OLD}
        # Where something can be made that nobody else sees: a tmpfs with binds of what was there (entries
        # only), or a whole tree. What is in neither is the host's, or read-only.
        self._stand_ins = {"/"}
        self._trees: set[str] = set()
        self._read_only: set[str] = set()
        # Stand-ins for read-only folders: writable until all that lies in them has its place.
        self._to_close: list[str] = []

    def enter(self, stage: str) -> None:
        """`stage` is any empty folder of the host."""
        unshare_mounts()
        mount("tmpfs", stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
        os.mkdir(stage + _OLD)
        number = _PIVOT_ROOT[os.uname().machine]
        _check(
            _libc.syscall(
                ctypes.c_long(number),
                ctypes.c_char_p(stage.encode()),
                ctypes.c_char_p((stage + _OLD).encode()),
            ),
            "pivot_root",
        )
        os.chdir("/")
        self._bind_entries(_OLD, "/", read_only=False)

    def bind(self, source: str, target: str, read_only: bool, subpath: str = "") -> None:
        """Makes the host's folder `source`, a path without symbolic links, appear at `target`; with
        `subpath` a folder in it, on a way without symbolic links, whoever writes to it meanwhile."""
        target = self._resolve(target)
        self._make(target)
        descriptor = open_below(_OLD + source, subpath)
        try:
            mount(f"/proc/self/fd/{descriptor}", target, "", MS_BIND)
        finally:
            os.close(descriptor)
        self._sources[target] = os.path.normpath(f"{_OLD}{source}/{subpath}")
        if read_only:
            _close(target)
            self._read_only.add(target)
        else:
            self._trees.add(target)

    def bind_file(self, source: str, target: str) -> None:
        """Makes the host's file `source` appear at `target`, read-only."""
        target = os.path.realpath(target)
        if not os.path.lexists(target):
            self._make(os.path.dirname(target))
            self._stand_in(os.path.dirname(target))
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(_OLD + source, target, "", MS_BIND)
        _close(target)

    def memory(self, target: str, size_bytes: int) -> None:
        """An empty file system in memory at `target`."""
        target = os.path.realpath(target)
        self._make(target)
        mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size_bytes}")
        self._trees.add(target)

    def close(self) -> None:
        for target in self._to_close:
            _close(target)
        _check(_libc.umount2(ctypes.c_char_p(_OLD.encode()), MNT_DETACH), f"umount {_OLD}")
        os.rmdir(_OLD)

    def _resolve(self, target: str) -> str:
        """Follows the host's links, but none that a mapped folder brings along: it could lead anywhere."""
        real, names = os.path.realpath(target), os.path.normpath(target).strip("/").split("/")
        way = culprit = ""
        for index, name in enumerate(names):
            way = f"{way}/{name}"
            place = os.path.realpath(way)
            mapped = place in self._read_only or place in self._trees
            if mapped and real != "/".join([place, *names[index + 1 :]]):
                culprit = way
        if culprit:
            raise OSError(f"a symbolic link in the folder at {culprit} lies on the way")
        return real

    def _make(self, target: str) -> None:
        if os.path.isdir(target):
            return
        if os.path.lexists(target):
            raise NotADirectoryError(f"mount destination {target} is a file")
        above = os.path.dirname(target)
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        self._stand_in(above)
        os.makedirs(target)

    def _stand_in(self, folder: str) -> None:
        """Makes `folder` one in which entries can be made: a tmpfs with binds of all that is there."""
        base = folder
        while base not in self._sources and base not in self._trees:
            base = os.path.dirname(base)
        if folder in self._stand_ins or base in self._trees:
            return
        source = self._sources[base] + folder.removeprefix("" if base == "/" else base)
        read_only = base in self._read_only
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
        self._bind_entries(source, folder, read_only)
        self._stand_ins.add(folder)
        self._sources[folder] = source
        if read_only:
            self._to_close.append(folder)

    def _bind_entries(self, source: str, target: str, read_only: bool) -> None:
        with os.scandir(source) as entries:
            names = [entry.name for entry in entries]
        if len(names) > NEIGHBOURS_MAX:
            raise OSError(f"{target} has {len(names)} entries, too many to map a folder beside them")
        for name in names:
            origin, place = os.path.join(source, name), os.path.join(target, name)
            if place == _OLD:
                continue
            kind = os.lstat(origin).st_mode
            if stat.S_ISLNK(kind):
                os.symlink(os.readlink(origin), place)
                continue
            if stat.S_ISDIR(kind):
                os.mkdir(place)
            else:
                os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))
            mount(origin, place, "", MS_BIND if read_only else MS_BIND | MS_REC)
            if read_only:
                _close(place)
                self._read_only.add(place)
                self._sources[place] = origin


def _close(target: str) -> None:
    mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY | _locked_flags(target))


def open_below(folder: str, subpath: str) -> int:
    """A descriptor of `folder/subpath`, on a way without symbolic links."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    for name in (part for part in subpath.split("/") if part not in ("", ".")):
        try:
            if name == "..":
                raise NotADirectoryError(20, "it leads out of the folder")
            following = os.open(name, flags, dir_fd=descriptor)
        except OSError as error:
            reason = "no folder, or a symbolic link" if error.errno == 20 else error.strerror
            raise OSError(error.errno, f"subpath `{subpath}`: `{name}`: {reason}") from error
        finally:
            os.close(descriptor)
        descriptor = following
    return descriptor


def _locked_flags(path: str) -> int:
    """Flags that a user namespace may not take off a mount when it makes it read-only."""
    current = os.statvfs(path).f_flag
    pairs = (
        (os.ST_NOSUID, MS_NOSUID),
        (os.ST_NODEV, MS_NODEV),
        (os.ST_NOEXEC, MS_NOEXEC),
        (os.ST_NOATIME, 1024),
    )
    flags = sum(flag for status, flag in pairs if current & status)
    return flags | ((1 << 21) if current & os.ST_RELATIME else 0)
