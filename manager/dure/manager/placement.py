"""Placement: which nodes a session's kernels get, or why they find no place.

Amounts are exact integers (milli-units). Which devices of a node they get is decided in `devices`. The
kernels of a session are placed all or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dure.manager import devices
from dure.manager.devices import DeviceCapacity
from dure.manager.model import Grant
from dure.wire.quantities import CPU, MEM, human_slot

# Ports of sessions of several kernels, at which they find each other: one on main1's node.
RENDEZVOUS_FIRST, RENDEZVOUS_COUNT = 30_000, 1_000


@dataclass(frozen=True)
class Node:
    """An agent as placement sees it; `grants` are all of its kernels that are not GONE.

    Nodes with one `host_id` share a network namespace, so a fixed port is taken on all of them.
    `available` is false with the sentence in `unavailable_reason` for a node that must get nothing new.
    """

    uid: str
    name: str
    resource_group: str
    slots: Mapping[str, int]
    devices: Sequence[DeviceCapacity] = ()
    grants: Sequence[Grant] = ()
    host_id: str = ""
    available: bool = True
    unavailable_reason: str = ""
    architecture: str = ""
    runs_images: bool = False
    maps_mounts: bool = True
    runs_strict: bool = False

    @property
    def host(self) -> str:
        return self.host_id or self.uid


@dataclass(frozen=True)
class Request:
    """What a session needs: `size` kernels of `slots` each, on one node unless `several_nodes`.

    `peers` counts the replicas of its endpoint that each node has already; `pack` prefers the fullest node
    to the one with the fewest of them. `needs_image` is a session that runs its image's own command,
    `has_image` one that names an image, `needs_mounts` one for which more than the model folder must appear
    in its file system. `salt` picks among free rendezvous ports, so that one which cannot be bound is not
    tried for ever. `enforcement` is the least that its shares of devices must have, `strict` says why it
    needs the profile `strict`; empty for any.
    """

    slots: Mapping[str, int]
    resource_group: str
    fixed_port: int = 0
    peers: Mapping[str, int] = field(default_factory=dict)
    size: int = 1
    several_nodes: bool = False
    pack: bool = False
    architecture: str = ""
    needs_image: bool = False
    has_image: bool = True
    needs_mounts: bool = False
    salt: int = 0
    enforcement: str = ""
    strict: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a node cannot take a session, or a kernel of it: a sentence for people."""

    node: str
    reason: str


@dataclass(frozen=True)
class Place:
    """A place of one kernel: what it gets, and of which node."""

    grant: Grant
    node: Node


@dataclass(frozen=True)
class Placed:
    """Places of all kernels of a session, main1 first."""

    kernels: tuple[Place, ...]

    @property
    def nodes(self) -> str:
        """Names, for people."""
        return ", ".join(dict.fromkeys(kernel.node.name for kernel in self.kernels))


@dataclass(frozen=True)
class NoPlace:
    """It cannot be placed now; `placed` kernels of it would have found a place."""

    refusals: tuple[Refusal, ...] = ()
    placed: int = 0

    def sentence(self, request: Request) -> str:
        """What is missing where, bounded to a few nodes."""
        if not self.refusals:
            return f"resource group `{request.resource_group}` has no agents; start one with `dure agent`"
        shown = [f"{refusal.node}: {refusal.reason}" for refusal in self.refusals[:8]]
        if len(self.refusals) > 8:
            shown.append(f"and {len(self.refusals) - 8} more nodes")
        what = "no node has room"
        if request.size > 1:
            what = f"no node has room for its {request.size} kernels"
        if self.placed:
            what = f"only {self.placed} of its {request.size} kernels found a place"
        return f"{what}: " + "; ".join(shown)


def place(request: Request, nodes: Iterable[Node]) -> Placed | NoPlace:
    """The best places, or why each node refuses.

    With the policy `spread` an endpoint's replicas go to different nodes, so that losing one costs little;
    apart from that, and always with `pack`, nodes are filled by GPU shares, which keeps whole GPUs free for
    those who need them. Ties go by name, so that the decision depends on nothing but its input.
    """
    group = [node for node in nodes if node.resource_group == request.resource_group]
    if request.size > 1 and not request.several_nodes:
        return _place_on_one(request, group)
    places: list[Place] = []
    for index in range(request.size):
        found = _place_kernel(request, group, places, main=index == 0)
        if not isinstance(found, Place):
            return NoPlace(found, len(places))
        places.append(found)
        group = [fuller(node, found.grant) for node in group]
    return Placed(tuple(places))


def fuller(node: Node, grant: Grant) -> Node:
    """The node after a grant, if it is the one that gave it."""
    return replace(node, grants=(*node.grants, grant)) if node.uid == grant.agent_uid else node


def _place_on_one(request: Request, group: list[Node]) -> Placed | NoPlace:
    """All kernels of a session on the best node that can take them all."""
    refusals: list[Refusal] = []
    candidates: list[tuple[tuple[int, ...], str, Placed]] = []
    for node in group:
        places: list[Place] = []
        grants = [grant for other in group if other.host == node.host for grant in other.grants]
        for index in range(request.size):
            found = fit_kernel(request, node, grants, main=index == 0)
            if not isinstance(found, Grant):
                after = f" after {index} of {request.size} kernels" if index else ""
                refusals.append(Refusal(node.name, found + after))
                break
            places.append(Place(found, node))
            grants.append(found)
            node = fuller(node, found)
        else:
            candidates.append((_rank(request, node), node.name, Placed(tuple(places))))
    if candidates:
        return min(candidates, key=lambda candidate: candidate[:2])[2]
    return NoPlace(tuple(sorted(refusals, key=lambda refusal: refusal.node)))


def _place_kernel(
    request: Request, group: list[Node], session: list[Place], *, main: bool
) -> Place | tuple[Refusal, ...]:
    """The best node for one more kernel of a session; its kernels go to different nodes if they can."""
    refusals: list[Refusal] = []
    candidates: list[tuple[tuple[int, ...], str, Place]] = []
    for node in group:
        grants = [grant for other in group if other.host == node.host for grant in other.grants]
        found = fit_kernel(request, node, grants, main=main)
        if isinstance(found, Grant):
            own = sum(1 for place in session if place.node.uid == node.uid)
            candidates.append(((own, *_rank(request, fuller(node, found))), node.name, Place(found, node)))
        else:
            refusals.append(Refusal(node.name, found))
    if candidates:
        return min(candidates, key=lambda candidate: candidate[:2])[2]
    return tuple(sorted(refusals, key=lambda refusal: refusal.node))


def _rank(request: Request, node: Node) -> tuple[int, ...]:
    """Of a node as it would be with the kernel; smaller is better."""
    shares = devices.free_shares(node.devices, node.grants)
    if request.pack:
        return (shares, _free(node, CPU), _free(node, MEM))
    return (request.peers.get(node.uid, 0), shares, len(node.grants))


def _free(node: Node, slot: str) -> int:
    return node.slots.get(slot, 0) - sum(grant.slots.get(slot, 0) for grant in node.grants)


def explain(request: Request, nodes: Iterable[Node]) -> list[tuple[str, str]]:
    """Name of each node of the group, and why it cannot take one more kernel (empty: it can)."""
    group = [node for node in nodes if node.resource_group == request.resource_group]
    found = []
    for node in sorted(group, key=lambda node: node.name):
        grants = [grant for other in group if other.host == node.host for grant in other.grants]
        fit = fit_kernel(request, node, grants, main=True)
        found.append((node.name, fit if isinstance(fit, str) else ""))
    return found


def fit_kernel(request: Request, node: Node, on_host: Sequence[Grant], *, main: bool) -> Grant | str:
    """What a kernel gets of a node, or why it cannot; `on_host` are all grants on the node's host."""
    if not node.available:
        return node.unavailable_reason or "not available"
    unfit = _unfit(request, node)
    if unfit:
        return unfit
    missing = [
        _short(slot, request.slots[slot], _free(node, slot), node.slots.get(slot, 0))
        for slot in (CPU, MEM)
        if request.slots.get(slot, 0) > _free(node, slot)
    ]
    parts = devices.fit(request.slots, request.enforcement, node.devices, node.grants)
    if isinstance(parts, str):
        missing.append(parts)
    fixed_port = request.fixed_port if _shares_network(request, node) else 0
    if fixed_port and any(fixed_port == grant.fixed_port for grant in on_host):
        missing.append(
            f"port {fixed_port} is taken on this host by another session; write `{{port}}` instead of "
            f"{fixed_port} in the definition's command, then each session gets its own"
        )
    rendezvous_port = 0
    if main and request.size > 1:
        rendezvous_port = _rendezvous_port(request.salt, {grant.rendezvous_port for grant in on_host})
        if not rendezvous_port:
            missing.append(f"all {RENDEZVOUS_COUNT} rendezvous ports are taken")
    if missing:
        return ", ".join(missing)
    assert not isinstance(parts, str)
    plain = {slot: amount for slot, amount in request.slots.items() if slot in (CPU, MEM)}
    return Grant(node.uid, plain, parts, fixed_port, rendezvous_port)


def _shares_network(request: Request, node: Node) -> bool:
    """Whether a number that a command names is one of the node's: a session in images has a network of its
    own, unless it may span nodes."""
    return not node.runs_images or (request.several_nodes and request.size > 1)


def _unfit(request: Request, node: Node) -> str:
    """What no free room would change."""
    if request.architecture and node.architecture and request.architecture != node.architecture:
        return f"its architecture is {node.architecture}, {request.architecture} is wanted"
    if request.needs_image and not node.runs_images:
        return "its back end runs no images, and the image's own command is wanted"
    if node.runs_images and not request.has_image:
        return "it runs sessions in images, and the endpoint has none: give it one with --image"
    if request.strict and not node.runs_strict:
        return f"its back end cannot do the security profile `strict`, which {request.strict} asks for"
    if (request.needs_mounts or request.size > 1) and not (node.maps_mounts or node.runs_images):
        what = "sessions of several kernels" if request.size > 1 else "extra mounts and shared memory"
        return f"it cannot make mount namespaces, which {what} need"
    return ""


def _rendezvous_port(salt: int, taken: set[int]) -> int:
    """A free port, 0 if there is none."""
    for offset in range(RENDEZVOUS_COUNT):
        port = RENDEZVOUS_FIRST + (salt + offset) % RENDEZVOUS_COUNT
        if port not in taken:
            return port
    return 0


def _short(slot: str, wanted: int, free: int, capacity: int) -> str:
    of = "" if wanted <= capacity else f", and {human_slot(slot, capacity)} in all"
    return f"{slot}: {human_slot(slot, max(free, 0))} free{of}, {human_slot(slot, wanted)} wanted"
