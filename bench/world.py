"""A cluster of its own for a benchmark, and what its processes cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from dure.client.dev.cluster import DevCluster, Plan
from dure.client.dev.ports import LoopbackProbe, Ports


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[DevCluster]:
    """Manager, one agent and one proxy on free ports in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        first = LoopbackProbe().spare(102)
        ports = Ports(manager=first, admin=first + 1, pool=(first + 2, first + 101))
        running = DevCluster(Plan(Path(folder), ports, agents=1, simulated_gpus=2), lambda line: None)
        try:
            await running.start([])
            yield running
        finally:
            await running.stop(asyncio.Event())


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
