"""Port leases in a file that all agents of the host share, under a lock; `ports` decides.

The file names the kernel's folder as the owner of a lease, so it survives the agent, and whoever reads
it can tell that the owner is gone. A port that a process outside of Dure holds is found by binding it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from dure.agent import ports
from dure.agent.ports import Lease, Table
from dure.agent.waiting import in_thread
from dure.wire.settings import write_file

# A file in a kernel's folder that owns the port at which the kernels of its session meet.
RENDEZVOUS = "rendezvous"


def default_lease_dir() -> Path:
    """Root shares one folder of the host; another user has one of its own (others' ports are found taken)."""
    return Path("/run/dure") if os.geteuid() == 0 else Path(f"/tmp/dure-{os.geteuid()}")


class Leases:
    """The leases of this host's network namespace."""

    def __init__(self, folder: Path, session_ports: range) -> None:
        namespace = os.stat("/proc/self/ns/net").st_ino
        self._file = folder / f"ports-{namespace}.json"
        self._session_ports = session_ports
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user; name another with --lease-dir")

    async def lease(self, kernel_folder: Path, fixed_port: int) -> int:
        """A port for a kernel: `fixed_port` itself unless 0. Raises ports.NoPort."""

        def decide(table: Table) -> tuple[int, Table]:
            if fixed_port:
                return fixed_port, ports.lease_fixed(table, str(kernel_folder), fixed_port, _is_free)
            return ports.lease(table, str(kernel_folder), self._session_ports, time.time(), _is_free)

        return await in_thread(self._change, decide)

    async def lease_rendezvous(self, kernel_folder: Path, port: int) -> None:
        """A second port for a kernel, this very one. Raises ports.NoPort."""
        owner = kernel_folder / RENDEZVOUS
        owner.touch()

        def decide(table: Table) -> tuple[int, Table]:
            return port, ports.lease_rendezvous(table, str(owner), port, _is_free)

        await in_thread(self._change, decide)

    async def gap(self) -> range:
        """Ports in a row of which a container engine may choose one, to be claimed then. Raises
        ports.NoPort."""
        found = range(0)

        def decide(table: Table) -> tuple[int, Table]:
            nonlocal found
            found = ports.gap(table, self._session_ports, time.time())
            return 0, table

        await in_thread(self._change, decide)
        return found

    async def claim(self, kernel_folder: Path, port: int) -> None:
        """Takes a port that the engine has chosen for a kernel."""

        def decide(table: Table) -> tuple[int, Table]:
            return port, ports.claim(table, str(kernel_folder), port)

        await in_thread(self._change, decide)

    async def release(self, kernel_folder: Path) -> None:
        """Lets the kernel's ports rest."""

        def decide(table: Table) -> tuple[int, Table]:
            now = time.time()
            table = ports.release(table, str(kernel_folder / RENDEZVOUS), now)
            return 0, ports.release(table, str(kernel_folder), now)

        await in_thread(self._change, decide)

    def _change(self, decide: Callable[[Table], tuple[int, Table]]) -> int:
        with open(self._file.with_suffix(".lock"), "a", encoding="ascii") as lock:
            # Held for a few milliseconds by any agent; the kernel lets go of it when one dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            table = ports.tidy(before, time.time(), lambda owner: Path(owner).exists())
            port, after = decide(table)
            if after != before:
                content = {
                    "cursor": after.cursor,
                    "leases": {str(p): [held.owner, held.released_at] for p, held in after.leases.items()},
                }
                write_file(self._file, json.dumps(content).encode())
            return port

    def _read(self) -> Table:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Table({})
        leases = {int(p): Lease(owner, released_at) for p, (owner, released_at) in content["leases"].items()}
        return Table(leases, content["cursor"])


def _is_free(port: int) -> bool:
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET or error.errno == 98:  # EADDRINUSE; no IPv6 here is fine
                return False
    return True
