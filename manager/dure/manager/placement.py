"""Placement: which nodes and which devices a session's kernels get, or why they find no place.

Amounts are exact integers (milli-units). One share is one physical GPU. A request of at most one share
gets one device, the fullest that has room (best fit), and is never split; one above gets
ceil(request) devices in portions that are equal to within a milli-share and sum to the request exactly.
`cuda.shares` and `cuda.device` exclude each other on a device. The kernels of a session are placed all or
none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dure.manager.model import DeviceShare, Grant
from dure.wire.quantities import CPU, DEVICES, MEM, MILLI, SHARES, format_slot, human_slot

# Ports of sessions of several kernels, at which they find each other: one on main1's node.
RENDEZVOUS_FIRST, RENDEZVOUS_COUNT = 30_000, 1_000


@dataclass(frozen=True)
class DeviceCapacity:
    """An accelerator that a node registered, with the slots that it offers."""

    id: str
    slots: Mapping[str, int]
    healthy: bool = True
    detail: str = ""


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

    @property
    def host(self) -> str:
        return self.host_id or self.uid


@dataclass(frozen=True)
class Request:
    """What a session needs: `size` kernels of `slots` each, on one node unless `several_nodes`.

    `peers` counts the replicas of its endpoint that each node has already; `pack` prefers the fullest node to
    the one with the fewest of them. `needs_image` is a session that runs its image's own command,
    `needs_mounts` one for which more than the model folder must appear in its file system. `salt` picks
    among free rendezvous ports, so that one which cannot be bound is not tried for ever.
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
    needs_mounts: bool = False
    salt: int = 0


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
            found = _fit(request, node, grants, main=index == 0)
            if not isinstance(found, Grant):
                after = f" after {index} of {request.size} kernels" if index else ""
                refusals.append(Refusal(node.name, found + after))
                break
            places.append(Place(found, node))
            grants.append(found)
            node = fuller(node, found)
        else:
            candidates.append((_rank(request, node, places[0].grant), node.name, Placed(tuple(places))))
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
        found = _fit(request, node, grants, main=main)
        if isinstance(found, Grant):
            own = sum(1 for place in session if place.node.uid == node.uid)
            candidates.append(((own, *_rank(request, node, found)), node.name, Place(found, node)))
        else:
            refusals.append(Refusal(node.name, found))
    if candidates:
        return min(candidates, key=lambda candidate: candidate[:2])[2]
    return tuple(sorted(refusals, key=lambda refusal: refusal.node))


def _rank(request: Request, node: Node, grant: Grant) -> tuple[int, ...]:
    """Smaller is better."""
    shares = _free_shares_after(node, grant)
    if request.pack:
        return (shares, _free(node, CPU), _free(node, MEM))
    return (request.peers.get(node.uid, 0), shares, len(node.grants))


def portions(shares: int) -> list[int]:
    """`cuda.shares` of a request, per device: 500 -> [500], 1500 -> [750, 750], 2500 -> [834, 833, 833]."""
    count = -(-shares // MILLI)
    base, rest = divmod(shares, count)
    return [base + 1] * rest + [base] * (count - rest)


def free_shares(node: Node) -> dict[str, int]:
    """Free `cuda.shares` of each healthy device of a node that is not taken as a whole."""
    return {
        device.id: free
        for device in node.devices
        if device.healthy and SHARES in device.slots
        for free in [_device_free(node, device)]
        if free is not None
    }


@dataclass
class _Held:
    shares: int = 0
    whole: bool = field(default=False)


def _held(node: Node, device_id: str) -> _Held:
    held = _Held()
    for grant in node.grants:
        for share in grant.devices:
            if share.device == device_id:
                if share.slot == DEVICES:
                    held.whole = True
                else:
                    held.shares += share.amount
    return held


def _device_free(node: Node, device: DeviceCapacity) -> int | None:
    """Free milli-shares, None for a device taken as a whole."""
    held = _held(node, device.id)
    return None if held.whole else device.slots.get(SHARES, 0) - held.shares


def _free(node: Node, slot: str) -> int:
    return node.slots.get(slot, 0) - sum(grant.slots.get(slot, 0) for grant in node.grants)


def _free_shares_after(node: Node, grant: Grant) -> int:
    taken = sum(share.amount for share in grant.devices)
    return sum(free_shares(node).values()) - taken


def explain(request: Request, nodes: Iterable[Node]) -> list[tuple[str, str]]:
    """Name of each node of the group, and why it cannot take one more kernel (empty: it can)."""
    group = [node for node in nodes if node.resource_group == request.resource_group]
    found = []
    for node in sorted(group, key=lambda node: node.name):
        grants = [grant for other in group if other.host == node.host for grant in other.grants]
        fit = _fit(request, node, grants, main=True)
        found.append((node.name, fit if isinstance(fit, str) else ""))
    return found


def _fit(request: Request, node: Node, on_host: Sequence[Grant], *, main: bool) -> Grant | str:
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
    devices: tuple[DeviceShare, ...] | str = ()
    if SHARES in request.slots:
        devices = _fit_shares(request.slots[SHARES], node)
    elif DEVICES in request.slots:
        devices = _fit_devices(request.slots[DEVICES], node)
    if isinstance(devices, str):
        missing.append(devices)
    if request.fixed_port and any(request.fixed_port == grant.fixed_port for grant in on_host):
        missing.append(
            f"port {request.fixed_port} is taken on this host by another session; write `{{port}}` instead "
            f"of {request.fixed_port} in the definition's command, then each session gets its own"
        )
    rendezvous_port = 0
    if main and request.size > 1:
        rendezvous_port = _rendezvous_port(request.salt, {grant.rendezvous_port for grant in on_host})
        if not rendezvous_port:
            missing.append(f"all {RENDEZVOUS_COUNT} rendezvous ports are taken")
    if missing:
        return ", ".join(missing)
    assert not isinstance(devices, str)
    plain = {slot: amount for slot, amount in request.slots.items() if slot in (CPU, MEM)}
    return Grant(node.uid, plain, devices, request.fixed_port, rendezvous_port)


def _unfit(request: Request, node: Node) -> str:
    """What no free room would change."""
    if request.architecture and node.architecture and request.architecture != node.architecture:
        return f"its architecture is {node.architecture}, {request.architecture} is wanted"
    if request.needs_image and not node.runs_images:
        return "its back end runs no images, and the image's own command is wanted"
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


def _fit_shares(wanted: int, node: Node) -> tuple[DeviceShare, ...] | str:
    free = free_shares(node)
    sizes = portions(wanted)
    # Best fit: the fullest device that still has room. The largest portions choose first, so equal
    # portions (they differ by at most one milli-share) cannot take the only device fit for a larger one.
    left = dict(free)
    taken: list[DeviceShare] = []
    for size in sizes:
        fitting = [(amount, device) for device, amount in left.items() if amount >= size]
        if not fitting:
            return _short_shares(wanted, sizes, node, free)
        _, device = min(fitting)
        del left[device]
        taken.append(DeviceShare(device, SHARES, size))
    return tuple(taken)


def _short_shares(wanted: int, sizes: list[int], node: Node, free: dict[str, int]) -> str:
    want = format_slot(SHARES, wanted)
    if not any(SHARES in device.slots for device in node.devices):
        return f"{SHARES}: no GPU, {want} wanted"
    total = sum(free.values())
    broken = [device for device in node.devices if not device.healthy]
    note = f" ({len(broken)} GPU(s) out of order: {broken[0].detail})" if broken else ""
    pieces = sorted((amount for amount in free.values() if amount > 0), reverse=True)
    shown = " and ".join(format_slot(SHARES, amount) for amount in pieces[:4])
    if len(pieces) > 4:
        shown += f" and {len(pieces) - 4} more"
    if total >= wanted and len(sizes) == 1:
        return (
            f"{SHARES}: fragmented, {format_slot(SHARES, total)} free, but in pieces of {shown}; "
            f"{want} wanted on one GPU{note}"
        )
    if total >= wanted:
        each = " + ".join(format_slot(SHARES, size) for size in sizes)
        return f"{SHARES}: {shown or '0.00'} free, {each} wanted on {len(sizes)} GPUs{note}"
    return f"{SHARES}: {format_slot(SHARES, total)} free, {want} wanted{note}"


def _fit_devices(wanted: int, node: Node) -> tuple[DeviceShare, ...] | str:
    count = wanted // MILLI
    whole = [
        device.id
        for device in node.devices
        if device.healthy and DEVICES in device.slots and _held(node, device.id) == _Held()
    ]
    if len(whole) < count:
        return f"{DEVICES}: {len(whole)} whole GPUs free, {count} wanted"
    return tuple(DeviceShare(device, DEVICES, MILLI) for device in sorted(whole)[:count])


def held_shares(node: Node, device_id: str) -> int:
    """Milli-shares of a device that are granted; a device taken as a whole counts as one share."""
    held = _held(node, device_id)
    return MILLI if held.whole else held.shares
