"""What to do about an endpoint that finds no place, from what stands in the way on each node.

What stands in the way of a request on a node is found by trying: with which obstacles removed a kernel fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum

from dure.manager import devices
from dure.manager.model import Grant
from dure.manager.placement import Node, Request, fit_kernel
from dure.wire import enforcement
from dure.wire.quantities import CPU, DEVICES, MEM, MILLI, SHARES, human_slot

NODES_SHOWN = 4


class Obstacle(Enum):
    """In the order in which advice is given."""

    AWAY = 1
    NO_IMAGE = 2
    NO_COMMAND = 3
    ARCHITECTURE = 4
    PROFILE = 5
    VIEW = 6
    SICK = 7
    ENFORCEMENT = 8
    PORT = 9
    ROOM = 10
    # No node of this size can ever have it.
    SIZE = 11


_Try = tuple[Request, Node]
_REMOVED: Mapping[Obstacle, Callable[[Request, Node], _Try]] = {
    Obstacle.AWAY: lambda request, node: (request, replace(node, available=True)),
    Obstacle.NO_IMAGE: lambda request, node: (replace(request, has_image=True), node),
    Obstacle.NO_COMMAND: lambda request, node: (replace(request, needs_image=False), node),
    Obstacle.ARCHITECTURE: lambda request, node: (replace(request, architecture=""), node),
    Obstacle.PROFILE: lambda request, node: (replace(request, strict=""), node),
    Obstacle.VIEW: lambda request, node: (request, replace(node, maps_mounts=True)),
    Obstacle.SICK: lambda request, node: (request, replace(node, devices=_healthy(node))),
    Obstacle.ENFORCEMENT: lambda request, node: (replace(request, enforcement=""), node),
    Obstacle.PORT: lambda request, node: (replace(request, fixed_port=0), node),
    Obstacle.ROOM: lambda request, node: (request, replace(node, grants=())),
}


def ways(request: Request, node: Node, on_host: Sequence[Grant]) -> list[frozenset[Obstacle]]:
    """What has to go so that one more kernel fits on a node: each set is enough. Empty if it fits now.
    `on_host` as for `fit_kernel`."""
    if _fits(request, node, on_host, ()):
        return []
    if not _fits(request, node, on_host, _REMOVED):
        return [frozenset({Obstacle.SIZE})]
    needed = frozenset(
        one for one in _REMOVED if not _fits(request, node, on_host, [o for o in _REMOVED if o is not one])
    )
    if needed and _fits(request, node, on_host, needed):
        return [needed]
    # One thing or another would do: GPUs that enforce too little, say, and others that are taken.
    rest = [one for one in _REMOVED if one not in needed]
    either = [needed | {one} for one in rest if _fits(request, node, on_host, needed | {one})]
    return either or [frozenset({Obstacle.ROOM})]


def _fits(request: Request, node: Node, on_host: Sequence[Grant], without: Iterable[Obstacle]) -> bool:
    for obstacle, remove in _REMOVED.items():
        if obstacle in without:
            request, node = remove(request, node)
    return isinstance(fit_kernel(request, node, on_host, main=False), Grant)


def advice(endpoint: str, request: Request, nodes: Iterable[Node]) -> list[str]:
    """What to do so that another replica finds a place; empty if a node takes one. The ways to the nodes that
    are nearest to it, each a line."""
    group = sorted((n for n in nodes if n.resource_group == request.resource_group), key=lambda n: n.name)
    if not group:
        return [
            f"resource group `{request.resource_group}` has no agents: start one with `dure agent`, or "
            f"choose another group: dure endpoint update {endpoint} --group NAME"
        ]
    found: list[tuple[Node, frozenset[Obstacle]]] = []
    for node in group:
        on_host = [grant for other in group if other.host == node.host for grant in other.grants]
        out = ways(request, node, on_host)
        if not out:
            return []
        found += [(node, way) for way in out if Obstacle.SIZE not in way]
    if not found:
        return _too_large(endpoint, request, group)
    fewest = min(len(way) for _, way in found)
    lines: list[str] = []
    for obstacle in _REMOVED:
        of = [node for node, way in found if obstacle in way and len(way) == fewest]
        lines += _lines(obstacle, endpoint, request, of) if of else []
    return lines


def _lines(obstacle: Obstacle, endpoint: str, request: Request, nodes: list[Node]) -> list[str]:
    update = f"dure endpoint update {endpoint}"
    names = ", ".join(node.name for node in nodes[:NODES_SHOWN]) + (" ..." if nodes[NODES_SHOWN:] else "")
    first = nodes[0].name
    match obstacle:
        case Obstacle.AWAY:
            again = f"one that is drained takes sessions again after `dure agent resume {first}`"
            return [f"bring back {names}: start its agent again; {again}"]
        case Obstacle.NO_IMAGE:
            return [f"give it an image: {update} --image IMAGE"]
        case Obstacle.NO_COMMAND:
            return [f"give it a command: {update} --command LINE, or a group whose agents run images"]
        case Obstacle.ARCHITECTURE:
            theirs = " or ".join(sorted({node.architecture for node in nodes}))
            return [f"use an image for {theirs}: {update} --image IMAGE --architecture {theirs.split()[0]}"]
        case Obstacle.PROFILE:
            if request.strict == "the endpoint":
                return [f"ask for less: {update} --profile default, or a group whose agents run images"]
            return [f"choose a group whose agents run images: {update} --group NAME"]
        case Obstacle.VIEW:
            return [f"run the agent of {names} as root, or permit user namespaces there"]
        case Obstacle.SICK:
            return [f"mend the GPUs that are out of order: dure agent get {first}"]
        case Obstacle.ENFORCEMENT:
            modes = {device.enforcement for node in nodes for device in node.devices}
            best = max(modes, key=enforcement.rank, default="") or enforcement.NONE
            return [
                f"require less: {update} --require-enforcement {best}",
                f"or have more enforced on {names}: docs/gpu-sharing.md says how",
            ]
        case Obstacle.PORT:
            return [f"write `{{port}}` in place of {request.fixed_port} in the definition's command"]
        case _:
            return [
                f"ask for less: {update} -r SLOT=AMOUNT",
                "or make room: see what is used with `dure agent list`, stop what is not needed",
            ]


def _too_large(endpoint: str, request: Request, group: list[Node]) -> list[str]:
    """That no node can ever take it, and what the largest has."""
    found = [_plain_too_large(slot, request, group) for slot in (CPU, MEM)]
    found += [_gpus_too_large(slot, request, group) for slot in (SHARES, DEVICES)]
    lines = [line for line in found if line]
    if not lines:
        lines.append("ask for less: no node has all of this, but other nodes have each of it")
    where = f"dure endpoint update {endpoint}"
    return [*lines, f"with {where} -r SLOT=AMOUNT, or choose a group with larger nodes: {where} --group NAME"]


def _plain_too_large(slot: str, request: Request, group: list[Node]) -> str:
    """Empty if it is not this."""
    largest = max(group, key=lambda node: node.slots.get(slot, 0))
    most = largest.slots.get(slot, 0)
    if request.slots.get(slot, 0) <= most:
        return ""
    return f"ask for less {slot}: the largest node, {largest.name}, has {human_slot(slot, most)}"


def _gpus_too_large(slot: str, request: Request, group: list[Node]) -> str:
    """Empty if it is not the GPUs."""
    if slot not in request.slots:
        return ""
    wanted = {slot: request.slots[slot]}
    if any(not isinstance(devices.fit(wanted, "", _healthy(node), ()), str) for node in group):
        return ""
    pieces = {
        node.name: [d.slots[slot] for d in devices.offered(_healthy(node), ()) if d.slots.get(slot)]
        for node in group
    }
    name, largest = max(pieces.items(), key=lambda one: sum(one[1]))
    if not largest:
        return (
            f"no node of `{request.resource_group}` has GPUs: leave {slot} out, or start an agent with some"
        )
    has = human_slot(slot, sum(largest))
    if max(largest) < MILLI:
        has += f" in parts of at most {human_slot(slot, max(largest))}"
    return f"ask for less {slot}: the largest node, {name}, has {has}"


def _healthy(node: Node) -> list[devices.DeviceCapacity]:
    """Its devices as if none were out of order; of GPUs and their parts, what there is now."""
    there = devices.offered(node.devices, node.grants)
    return [replace(device, healthy=True) for device in there]
