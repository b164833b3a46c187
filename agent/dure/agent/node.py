"""What all kernels of an agent share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp

from dure.agent import numa
from dure.agent.backends.base import Backend
from dure.agent.counts import Counts
from dure.agent.enforcement.modes import Modes
from dure.agent.folders import Folders
from dure.agent.leases import Leases
from dure.agent.log_archive import LogArchive
from dure.agent.serial_starts import SerialStarts
from dure.agent.storage import ManagerStorage
from dure.fleet.v1 import fleet_pb2
from dure.wire.tracing import Tracing


@dataclass(frozen=True)
class Node:
    """`host` is where proxies reach its sessions."""

    agent: str
    host: str
    backend: Backend
    leases: Leases
    folders: Folders
    devices: Mapping[str, fleet_pb2.Device]
    http: aiohttp.ClientSession
    logs: LogArchive
    storage: ManagerStorage
    modes: Modes
    serial: SerialStarts = field(default_factory=SerialStarts)
    counts: Counts = field(default_factory=Counts)
    tracing: Tracing | None = None
    # The machine's NUMA nodes, by number, if kernels are to be pinned to them.
    numa_nodes: Mapping[int, numa.Node] = field(default_factory=dict)
