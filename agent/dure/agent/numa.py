"""Which cores and memory are near a kernel's devices: what pins it there, as values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dure.fleet.v1 import fleet_pb2

MILLI = 1000
# No machine has more cores; a longer range is a file that is not what it should be.
NUMBERS_MAX = 65_536


@dataclass(frozen=True)
class Node:
    """What the agent may use of a NUMA node: cores by number, and memory, 0 for none."""

    cpus: frozenset[int]
    memory_bytes: int


@dataclass(frozen=True)
class Pin:
    """Cores and memory nodes, in the kernel's own notation; empty for anywhere."""

    cpus: str = ""
    memory_nodes: str = ""


def pin(
    devices: Sequence[fleet_pb2.Device], cpu_milli: int, memory_bytes: int, nodes: Mapping[int, Node]
) -> Pin:
    """Where a kernel goes whose devices are all near one node. It keeps what it was granted: a node with too
    few cores pins nothing, one with too little memory only the cores."""
    near = {device.numa_node if device.HasField("numa_node") else None for device in devices}
    if len(near) != 1:
        return Pin()
    (number,) = near
    node = nodes.get(number) if number is not None else None
    if node is None or not node.cpus or cpu_milli > len(node.cpus) * MILLI:
        return Pin()
    has_memory = 0 < node.memory_bytes >= memory_bytes
    return Pin(written(node.cpus), str(number) if has_memory else "")


def listed(text: str) -> frozenset[int]:
    """The numbers in the kernel's notation of a list, such as `0-7,16-23`. Raises ValueError."""
    found: set[int] = set()
    for piece in filter(None, text.strip().split(",")):
        first, dash, last = piece.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not 0 <= low <= high < NUMBERS_MAX:
            raise ValueError(f"`{text[:80]}` is no list of numbers")
        found.update(range(low, high + 1))
    return frozenset(found)


def written(numbers: Collection[int]) -> str:
    """The kernel's notation."""
    pieces: list[list[int]] = []
    for number in sorted(numbers):
        if pieces and pieces[-1][1] == number - 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in pieces)


def memory_total(meminfo: str) -> int:
    """Bytes, of a node's `meminfo`; 0 if it does not tell."""
    for line in meminfo.splitlines():
        words = line.split()
        if len(words) >= 4 and words[2] == "MemTotal:" and words[3].isdecimal():
            return int(words[3]) * 1024
    return 0
