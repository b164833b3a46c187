"""Finding and ending the processes of a session by /proc; for the shim and the agent."""

from __future__ import annotations

import os
import signal
import time


def start_ticks(pid: int) -> int | None:
    """Start time of a process (field 22 of its stat), None if it is not there. With the boot id it tells
    a process from a later one with the same pid."""
    fields = _stat(pid)
    return int(fields[19]) if fields is not None else None


def is_zombie(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] == "Z"


def _stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name stands in parentheses and may hold anything, a parenthesis included.
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(root: int) -> list[int]:
    """Processes below `root`, without it and without zombies."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for pid in all_pids():
        fields = _stat(pid)
        if fields is None:
            continue
        children.setdefault(int(fields[1]), []).append(pid)
        if fields[0] == "Z":
            zombies.add(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return [pid for pid in found if pid not in zombies]


def marked(marker: str) -> list[int]:
    """Processes that were started with `marker` (`NAME=value`) in their environment, but for this one."""
    wanted = marker.encode()
    found = []
    for pid in all_pids():
        if pid == os.getpid():
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:
            continue
    return found


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def reap() -> dict[int, int]:
    """Collects dead children of this process: pid to wait status."""
    dead: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return dead
        if pid == 0:
            return dead
        dead[pid] = status


def end_all_below(cgroup_kill: str, limit_s: float) -> None:
    """Kills everything below this process, a subreaper, until it has no child left."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if cgroup_kill:
            try:
                with open(cgroup_kill, "w", encoding="ascii") as file:
                    file.write("1")
            except OSError:
                cgroup_kill = ""
        for pid in descendants(os.getpid()):
            send(pid, signal.SIGKILL)
        reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        time.sleep(0.005)
