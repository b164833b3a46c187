"""Reads what processes have used: from files of control groups where there are any, else from /proc.

Everything here blocks for some microseconds a file; 200 kernels must be read in a few milliseconds, so files
are read whole, by one system call, and only the words that count are looked at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dure.agent.usage import Usage

FILE_BYTES_MAX = 65536
# One look at all processes of the node serves all kernels that are measured in the same round.
TABLE_S = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Groups:
    """The control groups of one kernel, and which of their files tell what."""

    def __init__(self, folders: Iterable[Path]) -> None:
        names = [str(folder) for folder in folders]
        # v1, in nanoseconds; mounted with `cpu` on most hosts. Every v2 group has a `cpu.stat`.
        self._cpu_v1 = _first(names, "cpuacct.usage")
        self._cpu_v2 = next(
            (f"{n}/cpu.stat" for n in names if b"usage_usec" in (_read(f"{n}/cpu.stat") or b"")), ""
        )
        self._memory = _first(names, "memory.usage_in_bytes") or _first(names, "memory.current")
        self._memory_stat = _first(names, "memory.stat")
        # Not v1's blkio: it books what is written back later on the system, not on the group.
        self._io = _first(names, "io.stat")
        self._procs = _first(names, "cgroup.procs")

        self.tells_cpu = bool(self._cpu_v1 or self._cpu_v2)
        self.tells_memory = bool(self._memory)
        self.tells_disk = bool(self._io)
        self.tells_pids = bool(self._procs)

    def pids(self) -> list[int]:
        data = _read(self._procs) if self._procs else None
        return [int(pid) for pid in (data or b"").split()]

    def cpu_s(self) -> float | None:
        if self._cpu_v1 and (data := _read(self._cpu_v1)) is not None:
            return int(data) / 1e9
        if self._cpu_v2 and (data := _read(self._cpu_v2)) is not None:
            micros = _word(data, b"usage_usec ")
            return micros / 1e6 if micros is not None else None
        return None

    def memory_bytes(self) -> int | None:
        """What is in use, without cached file content that the kernel would give up at once."""
        data = _read(self._memory) if self._memory else None
        if data is None:
            return None
        used, stat = int(data), _read(self._memory_stat) or b""
        cached = _word(stat, b"total_inactive_file ")
        if cached is None:
            cached = _word(stat, b"inactive_file ")
        return max(0, used - (cached or 0))

    def disk_bytes(self) -> tuple[int, int] | None:
        data = _read(self._io) if self._io else None
        if data is None:
            return None
        read = written = 0
        for word in data.split():
            if word.startswith(b"rbytes="):
                read += int(word[7:])
            elif word.startswith(b"wbytes="):
                written += int(word[7:])
        return read, written


class ProcessTable:
    """Parents and children of this node's processes, as of a moment ago."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._children: dict[int, list[int]] = {}

    def tree(self, root: int) -> list[int]:
        """A process and all below it, zombies included: what they used is still theirs."""
        now = time.monotonic()
        if now - self._at_s > TABLE_S:
            self._at_s, self._children = now, _all_children()
        found, queue = [root], [root]
        while queue:
            below = self._children.get(queue.pop(), [])
            found += below
            queue += below
        return found


def look(groups: Groups, table: ProcessTable, root: int) -> Usage:
    """One look at a kernel whose first process is `root`: the shim, which takes up what is orphaned below it.

    Processes add what their children used when they collect them, so that the sum over a tree only grows,
    however many come and go between two looks.
    """
    cpu_s, memory_bytes, disk = groups.cpu_s(), groups.memory_bytes(), groups.disk_bytes()
    at_s = time.monotonic()
    # A group that is going away tells nothing more: to go on with /proc would mix two counters.
    if not (groups.tells_cpu and groups.tells_memory and groups.tells_disk):
        # The shim stands in no group, but collects orphans, and writes the log on the kernel's behalf.
        pids = list({root, *groups.pids()}) if groups.tells_pids else table.tree(root)
        cpu_s = cpu_s if groups.tells_cpu else cpu_of(pids)
        memory_bytes = memory_bytes if groups.tells_memory else memory_of(pids)
        disk = disk if groups.tells_disk else disk_of(pids)
    read, written = disk if disk is not None else (None, None)
    return Usage(at_s, cpu_s, memory_bytes, read, written)


def with_network(usage: Usage, pid: int) -> Usage:
    """With what a process's network, which must be its kernel's own, has received and sent."""
    data = _read(f"/proc/{pid}/net/dev")
    if data is None:
        return usage
    received = sent = 0
    for line in data.split(b"\n")[2:]:
        name, colon, fields = line.partition(b":")
        if colon and name.strip() != b"lo":
            values = fields.split()
            received, sent = received + int(values[0]), sent + int(values[8])
    return replace(usage, net_received_bytes=received, net_sent_bytes=sent)


def cpu_of(pids: Iterable[int]) -> float | None:
    ticks, seen = 0, False
    for pid in pids:
        data = _read(f"/proc/{pid}/stat")
        if data is not None:
            # The name stands in parentheses and may hold anything.
            fields = data.rpartition(b")")[2].split()
            ticks, seen = ticks + sum(map(int, fields[11:15])), True
    return ticks / _TICKS_PER_S if seen else None


def memory_of(pids: Iterable[int]) -> int | None:
    """Private memory of each, and the most that any shares with others once."""
    private = shared = 0
    seen = False
    for pid in pids:
        fields = (_read(f"/proc/{pid}/statm") or b"").split()
        if len(fields) > 2:
            resident, common = int(fields[1]), int(fields[2])
            private, shared, seen = private + resident - common, max(shared, common), True
    return (private + shared) * _PAGE_BYTES if seen else None


def disk_of(pids: Iterable[int]) -> tuple[int, int] | None:
    """Bytes from and to disks; None where the system lets nobody look, or counts nothing."""
    read = written = 0
    seen = False
    for pid in pids:
        data = _read(f"/proc/{pid}/io")
        if data is not None:
            seen = True
            read += _word(data, b"\nread_bytes: ") or 0
            written += _word(data, b"\nwrite_bytes: ") or 0
    return (read, written) if seen else None


def _all_children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (data := _read(f"/proc/{name}/stat")) is not None:
            parent = int(data.rpartition(b")")[2].split(None, 2)[1])
            children.setdefault(parent, []).append(int(name))
    return children


def _first(folders: Iterable[str], file: str) -> str:
    """The path of the file in the first group that has it, empty for none."""
    return next((f"{folder}/{file}" for folder in folders if os.path.exists(f"{folder}/{file}")), "")


def _word(data: bytes, before: bytes) -> int | None:
    """The number that follows a key at the start of a line."""
    if data.startswith(before):
        start = 0
    else:
        start = data.find(before if before.startswith(b"\n") else b"\n" + before)
        if start < 0:
            return None
        start += 0 if before.startswith(b"\n") else 1
    start += len(before)
    end = data.find(b"\n", start)
    return int(data[start : end if end >= 0 else len(data)])


def _read(path: str) -> bytes | None:
    """None if the file, or the process that it tells of, is gone, or nobody may look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, FILE_BYTES_MAX)
    except OSError:
        return None
    finally:
        os.close(descriptor)
