"""Control groups of sessions: pure v2, or v1 and hybrid hosts, where limits live in one hierarchy each.

A session's groups are named `dure/<kernel uid>`, below the agent's own group where the kernel allows it
(so that limits set on the agent's container or unit bind its sessions too), else below the hierarchy's root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dure.agent.shim import processes

CONTROLLERS = ("cpu", "memory", "pids")
# Of sessions that are pinned to a NUMA node; the others need none.
CPUSET = "cpuset"
PARENT = "dure"
# Threads count: an inference server with many workers has some hundreds.
PIDS_MAX = 16384
_CPU_PERIOD_US = 100_000
_EMPTY_LIMIT_S = 5.0


@dataclass(frozen=True)
class Hierarchy:
    """A mounted hierarchy in which sessions can have groups. `controllers` that work there."""

    base: Path
    version: int
    controllers: frozenset[str]


@dataclass(frozen=True)
class Groups:
    """The groups of one session."""

    folders: tuple[Path, ...]
    kill_file: Path | None
    oom_file: Path | None

    @property
    def procs_files(self) -> list[str]:
        return [str(folder / "cgroup.procs") for folder in self.folders]


class Cgroups:
    """What this process may do with control groups. Tried, not assumed."""

    def __init__(
        self,
        hierarchies: tuple[Hierarchy, ...],
        limitations: tuple[str, ...],
        pinning: Hierarchy | None = None,
        no_pinning: str = "no control groups",
    ) -> None:
        self._hierarchies = hierarchies
        # A hierarchy of cpusets alone, as v1 has it.
        self._pinning = pinning
        self.limitations = limitations
        # Why sessions cannot be pinned; empty if they can.
        self.no_pinning = no_pinning

    @classmethod
    def probe(cls, mountinfo: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup") -> Cgroups:
        hierarchies: list[Hierarchy] = []
        problems: list[str] = []
        pinning: Hierarchy | None = None
        no_pinning = "there is no control group with the controller `cpuset`"
        own_paths = _own_paths(own)
        for mount, root, version, names in _mounts(mountinfo):
            key = "" if version == 2 else names[0]
            found, problem = _try_hierarchy(mount, root, own_paths.get(key, "/"), version, names)
            if names == (CPUSET,):
                pinning, no_pinning = found, problem
            elif found is not None:
                hierarchies.append(found)
                no_pinning = "" if CPUSET in found.controllers else no_pinning
            elif problem:
                problems.append(problem)
        working = frozenset().union(*(hierarchy.controllers for hierarchy in hierarchies))
        missing = [name for name in CONTROLLERS if name not in working]
        limitations: tuple[str, ...] = ()
        if missing:
            why = f" ({problems[0]})" if problems else ""
            limitations = (f"no limits on {', '.join(missing)} of sessions: no usable control group{why}",)
        return cls(tuple(hierarchies), limitations, pinning, no_pinning)

    def folders(self, uid: str, pinned: bool = False) -> list[Path]:
        """Where the groups of a session are, or will be."""
        return [hierarchy.base / PARENT / uid for hierarchy in self._used(pinned)]

    def create(
        self, uid: str, cpu_milli: int, memory_bytes: int, cpus: str = "", memory_nodes: str = ""
    ) -> Groups:
        """`cpus` and `memory_nodes` pin the session, as far as that works here."""
        folders: list[Path] = []
        kill_file = oom_file = None
        for hierarchy in self._used(bool(cpus)):
            folder = hierarchy.base / PARENT / uid
            _make(folder, hierarchy)
            folders.append(folder)
            limit = _limit_v2 if hierarchy.version == 2 else _limit_v1
            limit(folder, hierarchy.controllers, cpu_milli, memory_bytes)
            if CPUSET in hierarchy.controllers:
                _pin(folder, cpus, memory_nodes)
            if (folder / "cgroup.kill").exists():
                kill_file = folder / "cgroup.kill"
            if "memory" in hierarchy.controllers:
                oom_file = folder / ("memory.events" if hierarchy.version == 2 else "memory.oom_control")
        return Groups(tuple(folders), kill_file, oom_file)

    def _used(self, pinned: bool) -> tuple[Hierarchy, ...]:
        return (*self._hierarchies, self._pinning) if pinned and self._pinning else self._hierarchies


def folders_of(pid: int, mountinfo: str = "/proc/self/mountinfo") -> list[Path]:
    """The groups of a process in each mounted hierarchy; none if it is gone."""
    try:
        own = _own_paths(f"/proc/{pid}/cgroup")
    except OSError:
        return []
    found = []
    for mount, root, version, names in _mounts(mountinfo):
        path = own.get("" if version == 2 else names[0])
        if path is None:
            continue
        folder = mount / os.path.relpath(path, root) if _is_below(path, root) else mount / path.lstrip("/")
        # The top is everybody's.
        if folder != mount and folder.is_dir():
            found.append(folder)
    return found


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def members(folders: list[Path]) -> set[int]:
    """Processes in any of the groups, or below them."""
    found: set[int] = set()
    for folder in folders:
        for file in [folder / "cgroup.procs", *folder.glob("**/cgroup.procs")]:
            with contextlib.suppress(OSError):
                found.update(int(line) for line in file.read_text().split())
    return found


def end(folders: list[Path]) -> None:
    """Kills everything in the groups. Blocks for up to 5 s; raises TimeoutError if something survives."""
    deadline = time.monotonic() + _EMPTY_LIMIT_S
    while True:
        for folder in folders:
            with contextlib.suppress(OSError):
                (folder / "cgroup.kill").write_text("1")
        alive = members(folders)
        if not alive:
            return
        for pid in alive:
            processes.send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(alive)[:10]} do not die")
        time.sleep(0.005)


def remove(folders: list[Path]) -> None:
    """Removes the groups, which must be empty. Raises OSError."""
    deadline = time.monotonic() + _EMPTY_LIMIT_S
    for folder in folders:
        while True:
            try:
                for below in sorted((path for path in folder.glob("**/") if path != folder), reverse=True):
                    below.rmdir()
                folder.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                # The last dead process leaves its group a moment after its parent could know.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
                continue
            break
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def _make(folder: Path, hierarchy: Hierarchy) -> None:
    for attempt in range(10):
        try:
            folder.parent.mkdir(exist_ok=True)
            if hierarchy.version == 2 and hierarchy.controllers:
                wanted = " ".join(f"+{name}" for name in sorted(hierarchy.controllers))
                (folder.parent / "cgroup.subtree_control").write_text(wanted)
            if hierarchy.version == 1 and CPUSET in hierarchy.controllers:
                _inherit(folder.parent)
            folder.mkdir(exist_ok=True)
            if hierarchy.version == 1 and CPUSET in hierarchy.controllers:
                _inherit(folder)
            return
        except FileNotFoundError:
            # Another agent removed the empty parent in between.
            if attempt == 9:
                raise


def _inherit(folder: Path) -> None:
    """In v1 a new group of cpusets is empty, and takes in no process before it is filled."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (folder / name).read_text().strip():
            (folder / name).write_text((folder.parent / name).read_text())


def _pin(folder: Path, cpus: str, memory_nodes: str) -> None:
    if cpus:
        (folder / "cpuset.cpus").write_text(cpus)
    if memory_nodes:
        (folder / "cpuset.mems").write_text(memory_nodes)


def _limit_v1(folder: Path, controllers: frozenset[str], cpu_milli: int, memory_bytes: int) -> None:
    if "cpu" in controllers and cpu_milli:
        (folder / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(max(1000, cpu_milli * _CPU_PERIOD_US // 1000)))
    if "memory" in controllers and memory_bytes:
        (folder / "memory.limit_in_bytes").write_text(str(memory_bytes))
        with contextlib.suppress(OSError):
            # Not there without swap accounting.
            (folder / "memory.memsw.limit_in_bytes").write_text(str(memory_bytes))
    if "pids" in controllers:
        (folder / "pids.max").write_text(str(PIDS_MAX))


def _limit_v2(folder: Path, controllers: frozenset[str], cpu_milli: int, memory_bytes: int) -> None:
    if "cpu" in controllers and cpu_milli:
        (folder / "cpu.max").write_text(f"{max(1000, cpu_milli * _CPU_PERIOD_US // 1000)} {_CPU_PERIOD_US}")
    if "memory" in controllers and memory_bytes:
        (folder / "memory.max").write_text(str(memory_bytes))
        with contextlib.suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
    if "pids" in controllers:
        (folder / "pids.max").write_text(str(PIDS_MAX))


def _try_hierarchy(
    mount: Path, root: str, own: str, version: int, names: tuple[str, ...]
) -> tuple[Hierarchy | None, str]:
    below = os.path.relpath(own, root) if own.startswith(root.rstrip("/") + "/") or own == root else "."
    bases = list(dict.fromkeys([mount / below if below != "." else mount, mount]))
    problem = ""
    partial: Hierarchy | None = None
    for base in bases:
        controllers = frozenset(names)
        if version == 2:
            controllers, problem = _enable_v2(base)
        hierarchy = Hierarchy(base, version, controllers)
        trial = base / PARENT / f"probe-{os.getpid()}"
        try:
            _make(trial, hierarchy)
            limit = _limit_v2 if version == 2 else _limit_v1
            limit(trial, controllers, cpu_milli=1000, memory_bytes=2**30)
        except OSError as error:
            problem = f"{error.filename or trial}: {error.strerror}"
            continue
        finally:
            with contextlib.suppress(OSError):
                remove([trial])
        if controllers:
            return hierarchy, ""
        # Without controllers a v2 group still finds and kills every process of a session.
        partial = partial or hierarchy
    return partial, problem


def _enable_v2(base: Path) -> tuple[frozenset[str], str]:
    try:
        available = set((base / "cgroup.controllers").read_text().split()).intersection(CONTROLLERS)
        enabled = set((base / "cgroup.subtree_control").read_text().split())
        missing = available - enabled
        if missing:
            (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(missing)))
    except OSError as error:
        return frozenset(), f"{base}: {error.strerror}"
    # By itself: whether sessions can be pinned must not decide on their limits.
    with contextlib.suppress(OSError):
        if CPUSET in (base / "cgroup.controllers").read_text().split():
            (base / "cgroup.subtree_control").write_text(f"+{CPUSET}")
            available.add(CPUSET)
    return frozenset(available), ""


def _own_paths(file: str) -> dict[str, str]:
    paths: dict[str, str] = {}
    for line in Path(file).read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = path
    return paths


def _mounts(file: str) -> list[tuple[Path, str, int, tuple[str, ...]]]:
    """Mount point, root, version and controllers of interest of each hierarchy."""
    found: list[tuple[Path, str, int, tuple[str, ...]]] = []
    for line in Path(file).read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            found.append((Path(mount), root, 2, ()))
        elif kind == "cgroup":
            names = tuple(name for name in options.split(",") if name in (*CONTROLLERS, CPUSET))
            if names:
                found.append((Path(mount), root, 1, names))
    return found
