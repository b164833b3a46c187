"""What the agent says of its machine: cores, memory, boot, network namespace, address."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import socket
from pathlib import Path

from dure.agent import numa
from dure.wire import quantities

RESOLVE_LIMIT_S = 10.0


def cpu_milli(cgroups: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may use, in milli-units, by its affinity and its control group."""
    least = len(os.sched_getaffinity(0)) * quantities.MILLI
    for group in _own_groups(Path(cgroups), "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            quota, period = _number(group / "cpu.max"), _number(group / "cpu.max", 1)
        if quota and period:
            least = min(least, quota * quantities.MILLI // period)
    return least


def memory_bytes(meminfo: str = "/proc/meminfo", cgroups: str = "/sys/fs/cgroup") -> int:
    """Memory of the machine, or what the agent's control group leaves of it."""
    least = 0
    for line in Path(meminfo).read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            least = int(line.split()[1]) * 1024
    for group in _own_groups(Path(cgroups), "memory"):
        limit = _number(group / "memory.limit_in_bytes") or _number(group / "memory.max")
        if limit:
            least = min(least, limit)
    return least


def numa_nodes(
    root: str = "/sys/devices/system/node", status: str = "/proc/self/status"
) -> dict[int, numa.Node]:
    """What this process may use of each NUMA node that has cores."""
    cores = os.sched_getaffinity(0)
    memory = _allowed_memory_nodes(status)
    found: dict[int, numa.Node] = {}
    for folder in Path(root).glob("node[0-9]*"):
        try:
            number = int(folder.name.removeprefix("node"))
            cpus = numa.listed((folder / "cpulist").read_text(encoding="ascii")) & cores
            meminfo = (folder / "meminfo").read_text(encoding="ascii") if number in memory else ""
        except (OSError, ValueError):
            continue
        if cpus:
            found[number] = numa.Node(cpus, numa.memory_total(meminfo))
    return found


def _allowed_memory_nodes(status: str) -> frozenset[int]:
    for line in Path(status).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("Mems_allowed_list:"):
            return numa.listed(line.split(":", 1)[1])
    return frozenset()


def _own_groups(root: Path, controller: str) -> list[Path]:
    """The agent's control group and those above it, in the hierarchy of a controller and in that of v2."""
    found: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = root / controller if names else root
        group = base / path.lstrip("/")
        while group.is_relative_to(base):
            found.append(group)
            group = group.parent
    return found


def _number(file: Path, field: int = 0) -> int | None:
    """A number in a file; None if there is no such file, or no limit (`max`, -1)."""
    try:
        text = file.read_text(encoding="ascii").split()[field]
    except (OSError, IndexError):
        return None
    return int(text) if text.isdecimal() else None


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def host_id() -> str:
    """Same for all that share this network namespace, and for nobody else: a boot is of one machine."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return hashlib.sha256(f"{boot_id()}:{namespace}".encode()).hexdigest()[:32]


def host_table() -> str:
    """The node's own table of host names, empty if it has none."""
    try:
        return Path("/etc/hosts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


async def resolve(address: str) -> str:
    """The numeric address of a host. Raises OSError."""
    try:
        async with asyncio.timeout(RESOLVE_LIMIT_S):
            found = await asyncio.get_running_loop().getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except TimeoutError as error:
        raise OSError(f"no answer within {RESOLVE_LIMIT_S:g} s") from error
    return str(found[0][4][0])


async def local_address(manager: str) -> str:
    """The address of this node on its way to `host:port`. Raises OSError; sends nothing."""
    host, _, port = manager.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        local = str(probe.getsockname()[0])
    return str(ipaddress.ip_address(local.partition("%")[0]))
