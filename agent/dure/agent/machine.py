"""What the agent says of its machine: cores, memory, boot, network namespace, address."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import socket
from pathlib import Path

from dure.wire import quantities


def cpu_milli() -> int:
    """Cores that this process may use, in milli-units."""
    return len(os.sched_getaffinity(0)) * quantities.MILLI


def memory_bytes(meminfo: str = "/proc/meminfo", cgroups: str = "/sys/fs/cgroup") -> int:
    """Memory of the machine, or what the agent's control group leaves of it."""
    total = 0
    for line in Path(meminfo).read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for place in _own_memory_groups(Path(cgroups)):
        try:
            text = place.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal() and 0 < int(text) < total:
            total = int(text)
    return total


def _own_memory_groups(root: Path) -> list[Path]:
    """Limit files of the agent's group and those above it."""
    found: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, names, path = line.split(":", 2)
        if "memory" in names.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        elif not names:
            base, name = root, "memory.max"
        else:
            continue
        group = base / path.lstrip("/")
        while group.is_relative_to(base):
            found.append(group / name)
            group = group.parent
    return found


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def host_id() -> str:
    """Same for all that share this network namespace, and for nobody else: a boot is of one machine."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return hashlib.sha256(f"{boot_id()}:{namespace}".encode()).hexdigest()[:32]


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
